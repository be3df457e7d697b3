"""Paged latent attention in Triton against its definition in float64."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from lockstep.kernels.formats.kv_format import latent_entry
from lockstep.kernels.reference.kv_entries import write_latents
from lockstep.kernels.reference.mla import mla_attend as reference
from lockstep.kernels.triton.mla import LatentAttend
from lockstep.kernels.triton.mla_prefill import Windows, break_even, plan_windows
from lockstep.kernels.triton.tiles import DEFAULT, AttendTile, Tiles
from support.grids import pairwise
from support.kernels.fp8_entries import latents_in
from support.kernels.paged_rows import PAGE_SIZE, PagedRows, on_device
from support.kernels.poison import DEVICE, poisoned

NOPE, ROPE, LATENT, VALUE, SCALE = 12, 6, 20, 10, 0.25

DTYPES = [
    (torch.float32, torch.float32, 2e-5),
    (torch.float16, torch.float16, 5e-3),
    (torch.bfloat16, torch.bfloat16, 4e-2),
    (torch.float32, torch.bfloat16, 2e-5),
]

CASES = {
    "decode": ([(0, 1), (17, 1), (8, 1)], 3),
    "decode far apart": ([(300, 1), (2, 1), (90, 1)], 3),
    "extends": ([(0, 9), (0, 1), (30, 12), (7, 1)], 0),
    "both": ([(5, 1), (64, 1), (0, 20), (11, 3)], 2),
    "nothing": ([], 0),
}


EXTENDS = {
    "from nothing": ([(0, 40)], 0),
    "over prefixes": ([(3, 1), (100, 70), (0, 64), (63, 2)], 1),
    "few queries among many": ([(0, 5), (70, 40), (9, 3), (0, 80)], 0),
}
# Every row expanded, or those of more than 30 queries; in one window, or in several of 64 keys.
EXPANSIONS = {
    "all": (0, 1 << 30),
    "all, in windows": (0, 1),
    "some": (30, 1 << 30),
    "some, in windows": (30, 1),
}


def in_splits(splits: int) -> Tiles:
    """Both forms of the sums, latents in chunks or whole, and blocks one after the other or not."""
    tile = AttendTile(32, 32, 4, 2, splits=splits)
    if splits != 1:
        tile = dataclasses.replace(tile, keys=64, chunk=512, turned=True, serial=True)
    names = ("latent_decode", "latent_decode_fp8", "latent_extend", "latent_extend_fp8")
    return dataclasses.replace(DEFAULT, **dict.fromkeys(names, tile))


def expanded(name: str) -> Tiles:
    most_absorbed, num_bytes = EXPANSIONS[name]
    return dataclasses.replace(
        DEFAULT, most_absorbed=most_absorbed, prefill_bytes=num_bytes, prefill=AttendTile(16, 32, 4, 2)
    )


def definition(q_nope: Tensor, q_rope: Tensor, latents: Tensor, expand: Tensor, start: int) -> Tensor:
    c, k_rope = latents.double().split([LATENT, ROPE], -1)
    kv = torch.einsum("lc,hpc->lhp", c, expand.double())
    scores = torch.einsum("thn,lhn->htl", q_nope.double(), kv[..., :NOPE]) + torch.einsum(
        "the,le->htl", q_rope.double(), k_rope
    )
    position = torch.arange(len(q_nope), device=c.device)[:, None] + start
    scores = (scores * SCALE).masked_fill(torch.arange(len(latents), device=c.device) > position, -torch.inf)
    return torch.einsum("htl,lhv->thv", scores.softmax(-1), kv[..., NOPE:])


@pairwise({"case": CASES, "dtype, cache_dtype, tolerance": DTYPES, "heads": [4, 20]})
def test_equals_the_definition(
    case: str, heads: int, dtype: torch.dtype, cache_dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(0)
    rows = PagedRows(*CASES[case])
    num_tokens = int(rows.counts.sum())
    cache = torch.full((rows.num_pages * PAGE_SIZE, LATENT + ROPE), float("nan"), dtype=cache_dtype)
    for row in range(len(rows.starts)):
        cache[rows.places(row)] = torch.randn(len(rows.places(row)), LATENT + ROPE).to(cache_dtype)
    cache = cache.to(DEVICE)
    q_nope, q_rope = torch.randn(num_tokens, heads, NOPE + ROPE).to(DEVICE, dtype).split([NOPE, ROPE], -1)
    expand = (torch.randn(heads, NOPE + VALUE, LATENT) * LATENT**-0.5).to(DEVICE, dtype)
    batch = on_device(rows.batch, DEVICE)
    for splits in (1, 3) if "decode" in case else (0,):
        with poisoned():
            out = LatentAttend(in_splits(splits))(q_nope, q_rope, cache, expand, batch, SCALE)
        assert (out.shape, out.dtype) == ((num_tokens, heads, VALUE), dtype)
        for row, start in enumerate(rows.starts.tolist()):
            tokens, places = rows.queries(row), rows.places(row)
            expected = definition(q_nope[tokens], q_rope[tokens], cache[places], expand, start)
            torch.testing.assert_close(out[tokens].double(), expected, rtol=tolerance, atol=tolerance)


@pairwise(
    {
        "case": CASES,
        "latent, heads": [(20, 4), (300, 20)],
        "dtype, tolerance": [(torch.float32, 2e-5), (torch.bfloat16, 4e-2)],
    }
)
def test_fp8_pages(case: str, latent: int, heads: int, dtype: torch.dtype, tolerance: float) -> None:
    """Against attention over a pool of the decoded numbers."""
    torch.manual_seed(0)
    rows = PagedRows(*CASES[case])
    cache = torch.full(
        (rows.num_pages * PAGE_SIZE, *latent_entry("fp8", latent, ROPE)), 255, dtype=torch.uint8
    )
    for row in range(len(rows.starts)):
        count = len(rows.places(row))
        write_latents(cache, rows.places(row), torch.randn(count, latent), torch.randn(count, ROPE))
    q_nope, q_rope = torch.randn(int(rows.counts.sum()), heads, NOPE + ROPE).to(dtype).split([NOPE, ROPE], -1)
    expand = (torch.randn(heads, NOPE + VALUE, latent) * latent**-0.5).to(dtype)
    numbers = torch.zeros(len(cache), latent + ROPE)
    for row in range(len(rows.starts)):
        numbers[rows.places(row)] = latents_in(cache[rows.places(row)], latent)
    expected = reference(q_nope.float(), q_rope.float(), numbers, expand.float(), rows.batch, SCALE)
    on_card = [x.to(DEVICE) for x in (q_nope, q_rope, cache, expand)]
    for splits in (1, 3) if "decode" in case else (0,):
        with poisoned():
            out = LatentAttend(in_splits(splits))(*on_card, on_device(rows.batch, DEVICE), SCALE)
        torch.testing.assert_close(out.float().cpu(), expected, rtol=tolerance, atol=tolerance)


def test_equals_the_reference_at_real_latents() -> None:
    torch.manual_seed(1)
    rows = PagedRows([(140, 1), (65, 1), (3, 5)], 2)
    cache = torch.randn(rows.num_pages * PAGE_SIZE, 576, device=DEVICE)
    q_nope, q_rope = torch.randn(7, 16, 192, device=DEVICE).split([128, 64], -1)
    expand = torch.randn(16, 256, 512, device=DEVICE) * 512**-0.5
    got = LatentAttend(DEFAULT)(q_nope, q_rope, cache, expand, on_device(rows.batch, DEVICE), 192**-0.5)
    expected = reference(q_nope.cpu(), q_rope.cpu(), cache.cpu(), expand.cpu(), rows.batch, 192**-0.5).to(
        DEVICE
    )
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pairwise({"expansion": EXPANSIONS, "case": EXTENDS, "known": [False, True]})
def test_expanded_rows(case: str, expansion: str, known: bool) -> None:
    """With lengths that the host knows, and without."""
    torch.manual_seed(2)
    rows = PagedRows(*EXTENDS[case])
    num_tokens, heads = int(rows.counts.sum()), 2
    cache = torch.full((rows.num_pages * PAGE_SIZE, LATENT + ROPE), float("nan"))
    for row in range(len(rows.starts)):
        cache[rows.places(row)] = torch.randn(len(rows.places(row)), LATENT + ROPE)
    q_nope, q_rope = torch.randn(num_tokens, heads, NOPE + ROPE, device=DEVICE).split([NOPE, ROPE], -1)
    expand = torch.randn(heads, NOPE + VALUE, LATENT, device=DEVICE) * LATENT**-0.5
    batch = on_device(rows.batch, DEVICE)
    if known:
        batch = dataclasses.replace(batch, query_starts=rows.batch.query_starts, lengths=rows.batch.lengths)
    with poisoned():
        out = LatentAttend(expanded(expansion))(q_nope, q_rope, cache.to(DEVICE), expand, batch, SCALE)
    for row, start in enumerate(rows.starts.tolist()):
        tokens, places = rows.queries(row), rows.places(row)
        expected = definition(q_nope[tokens], q_rope[tokens], cache[places].to(DEVICE), expand, start)
        torch.testing.assert_close(out[tokens].double(), expected, rtol=2e-5, atol=2e-5)


@pairwise(
    {
        "dtype, cache_dtype": [
            (torch.bfloat16, torch.uint8),
            (torch.float32, torch.uint8),
            (torch.bfloat16, torch.bfloat16),
        ],
        "latent": [20, 300],
        "expansion": ["all", "all, in windows"],
    }
)
def test_expanded_rows_in_every_format(
    dtype: torch.dtype, cache_dtype: torch.dtype, latent: int, expansion: str
) -> None:
    torch.manual_seed(3)
    rows = PagedRows([(40, 21), (0, 9)], 0)
    places = torch.cat([rows.places(0), rows.places(1)])
    entry = latent_entry("fp8" if cache_dtype == torch.uint8 else "bf16", latent, ROPE)
    cache = torch.full((rows.num_pages * PAGE_SIZE, *entry), 255, dtype=torch.uint8).to(cache_dtype)
    write_latents(cache, places, torch.randn(len(places), latent), torch.randn(len(places), ROPE))
    numbers = torch.zeros(len(cache), latent + ROPE)
    numbers[places] = (
        latents_in(cache[places], latent) if cache_dtype == torch.uint8 else cache[places].float()
    )
    q_nope, q_rope = torch.randn(30, 3, NOPE + ROPE).to(dtype).split([NOPE, ROPE], -1)
    expand = (torch.randn(3, NOPE + VALUE, latent) * latent**-0.5).to(dtype)
    expected = reference(q_nope.float(), q_rope.float(), numbers, expand.float(), rows.batch, SCALE)
    with poisoned():
        on_card = [x.to(DEVICE) for x in (q_nope, q_rope, cache, expand)]
        out = LatentAttend(expanded(expansion))(*on_card, on_device(rows.batch, DEVICE), SCALE)
    tolerance = 2e-5 if dtype == torch.float32 else 4e-2
    torch.testing.assert_close(out.float().cpu(), expected, rtol=tolerance, atol=tolerance)


def test_the_break_even_of_expansion() -> None:
    """Operations per key and head at DeepSeek-V3's sizes: 2176 per query on latents; 262144 plus
    640 per query on expanded ones.
    """
    most = break_even(128, 64, 128, 512)
    assert 2176 * most <= 262144 + 640 * most and 2176 * (most + 1) > 262144 + 640 * (most + 1)
    assert break_even(128, 64, 128, 64) > 1 << 30  # latents narrower than heads


def test_the_host_bounds_the_windows_by_shapes_or_by_lengths() -> None:
    batch = PagedRows([(5, 1), (100, 40), (0, 200)], 1).batch
    assert plan_windows(batch, 241, 30, 64) == Windows(3 + 4, 64, 30)
    assert plan_windows(batch, 241, 30, 1 << 20) == Windows(1, 192 + 256, 30)
    assert plan_windows(batch, 241, 50, 64) == Windows(4, 64, 50)
    unknown = on_device(batch, DEVICE)
    width = -(-unknown.pages_RP.shape[1] * PAGE_SIZE // 64)
    assert plan_windows(unknown, 241, 30, 64) == Windows(2 * width, 64, 30)
    # 240 tokens: at most one row of that many.
    assert plan_windows(unknown, 241, 239, 64) == Windows(width, 64, 239)
    assert plan_windows(unknown, 241, 240, 64) is None
    wide = dataclasses.replace(unknown, pages_RP=unknown.pages_RP.repeat(1, 100))
    assert plan_windows(wide, 241, 30, 64) is None, "more launches than it is worth"
