"""Paged grouped-query attention in Triton against its definition in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lockstep.kernels.formats.kv_format import head_entry
from lockstep.kernels.reference.attention import PLAIN_RULE, AttentionRule, attend as reference
from lockstep.kernels.reference.kv_entries import write_heads
from lockstep.kernels.triton.attention import PagedAttend
from lockstep.kernels.triton.tiles import DEFAULT, AttendTile, Tiles
from support.grids import pairwise
from support.kernels.fp8_entries import heads_in
from support.kernels.paged_rows import PAGE_SIZE, PagedRows, on_device
from support.kernels.poison import DEVICE, poisoned

SCALE = 0.3

# The model's dtype, the cache's, and the tolerance.
DTYPES = [
    (torch.float32, torch.float32, 2e-5),
    (torch.float16, torch.float16, 5e-3),
    (torch.bfloat16, torch.bfloat16, 3e-2),
    (torch.float32, torch.bfloat16, 2e-5),
    (torch.bfloat16, torch.float32, 3e-2),
]

CASES = {
    "decode": ([(0, 1), (17, 1), (8, 1)], 3),
    "decode far apart": ([(300, 1), (2, 1), (90, 1)], 3),
    "extends": ([(0, 9), (0, 1), (30, 12), (7, 1)], 0),
    "tiles over a prefix": ([(21, 70)], 0),
    "both": ([(5, 1), (64, 1), (0, 20), (11, 3)], 2),
    "nothing": ([], 0),
}


def in_splits(splits: int, keys: int = 64) -> Tiles:
    tile = AttendTile(16, keys, 4, 3, splits=splits)
    return dataclasses.replace(DEFAULT, decode=tile, decode_fp8=tile)


def of_window(window: int, first: float | None = None) -> Callable[[int], AttentionRule]:
    """Sinks grow from ``first`` to its negative over the heads."""

    def rule(heads: int) -> AttentionRule:
        sinks = None if first is None else torch.linspace(first, -first, heads, device=DEVICE)
        return AttentionRule(window, sinks)

    return rule


RULES = {
    "all": of_window(0),
    "window of 1": of_window(1),
    "window of 11": of_window(11),
    "window of 80, sinks": of_window(80, -4),
    "sinks": of_window(0, 200),
}


def definition(
    q_THD: Tensor, k_LKD: Tensor, v_LKD: Tensor, start: int, rule: AttentionRule = PLAIN_RULE
) -> Tensor:
    group = q_THD.shape[1] // k_LKD.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k_LKD, v_LKD))
    scores = torch.einsum("thd,lhd->htl", q_THD.double(), k) * SCALE
    position = torch.arange(len(q_THD), device=k.device)[:, None] + start
    scores = scores.masked_fill(torch.arange(len(k), device=k.device) > position, -torch.inf)
    if rule.window:
        hidden = torch.arange(len(k), device=k.device) <= position - rule.window
        scores = scores.masked_fill(hidden, -torch.inf)
    if rule.sinks_H is not None:
        sinks = rule.sinks_H.double()[:, None, None].expand(-1, len(q_THD), 1)
        scores = torch.cat([scores, sinks], -1)
    return torch.einsum("htl,lhd->thd", scores.softmax(-1)[..., : len(k)], v)


@pairwise(
    {
        "case": CASES,
        "dtype, cache_dtype, tolerance": DTYPES,
        "heads, kv_heads, dim": [(6, 2, 16), (6, 1, 20), (2, 2, 32)],
        "rule": RULES,
    }
)
def test_equals_the_definition(
    case: str,
    heads: int,
    kv_heads: int,
    dim: int,
    rule: str,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    tolerance: float,
) -> None:
    torch.manual_seed(0)
    rows = PagedRows(*CASES[case])
    # The contents of other rows' pages and of places past a row's end must not matter, not even
    # NaN.
    k_cache, v_cache = (
        torch.full((rows.num_pages * PAGE_SIZE, kv_heads, dim), float("nan"), dtype=cache_dtype)
        for _ in range(2)
    )
    for row in range(len(rows.starts)):
        places = rows.places(row)
        k_cache[places], v_cache[places] = (
            torch.randn(len(places), kv_heads, dim).to(cache_dtype) for _ in range(2)
        )
    k_cache, v_cache = k_cache.to(DEVICE), v_cache.to(DEVICE)
    q = torch.randn(int(rows.counts.sum()), heads + 2, dim).to(DEVICE, dtype)[:, 1:-1]
    own = RULES[rule](heads)
    for splits in (1, 3) if "decode" in case else (0,):
        tiles = in_splits(splits)
        with poisoned():
            out = PagedAttend(tiles)(q, k_cache, v_cache, on_device(rows.batch, DEVICE), SCALE, own)
        assert (out.shape, out.dtype) == (q.shape, dtype)
        for row, start in enumerate(rows.starts.tolist()):
            tokens, places = rows.queries(row), rows.places(row)
            expected = definition(q[tokens], k_cache[places], v_cache[places], start, own)
            torch.testing.assert_close(out[tokens].double(), expected, rtol=tolerance, atol=tolerance)


@pairwise(
    {
        "case": CASES,
        "heads, kv_heads, dim": [(6, 1, 20), (6, 3, 160)],
        "dtype, tolerance": [(torch.float32, 2e-5), (torch.bfloat16, 3e-2)],
    }
)
def test_fp8_pages(
    case: str, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(0)
    rows = PagedRows(*CASES[case])
    caches = [
        torch.full((rows.num_pages * PAGE_SIZE, *head_entry("fp8", kv_heads, dim)), 255, dtype=torch.uint8)
        for _ in range(2)
    ]
    for row in range(len(rows.starts)):
        for cache in caches:
            write_heads(cache, rows.places(row), torch.randn(len(rows.places(row)), kv_heads, dim))
    q = torch.randn(int(rows.counts.sum()), heads, dim).to(DEVICE, dtype)
    k_cache, v_cache = (cache.to(DEVICE) for cache in caches)
    for splits in (1, 3) if "decode" in case else (0,):
        with poisoned():
            out = PagedAttend(in_splits(splits))(q, k_cache, v_cache, on_device(rows.batch, DEVICE), SCALE)
        for row, start in enumerate(rows.starts.tolist()):
            tokens, places = rows.queries(row), rows.places(row)
            k, v = (heads_in(cache[places], kv_heads, dim).to(DEVICE) for cache in caches)
            torch.testing.assert_close(
                out[tokens].double(), definition(q[tokens], k, v, start), rtol=tolerance, atol=tolerance
            )


def test_equals_the_reference_at_a_real_head() -> None:
    torch.manual_seed(1)
    rows = PagedRows([(140, 1), (65, 1), (3, 5)], 2)
    caches = [torch.randn(rows.num_pages * PAGE_SIZE, 2, 128, device=DEVICE) for _ in range(2)]
    q = torch.randn(7, 16, 128, device=DEVICE)
    got = PagedAttend(DEFAULT)(q, *caches, on_device(rows.batch, DEVICE), 128**-0.5)
    expected = reference(q.cpu(), caches[0].cpu(), caches[1].cpu(), rows.batch, 128**-0.5).to(DEVICE)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("page_size", [8, 16, 32, 64])
def test_pages_of_any_size_beside_blocks_of_32_keys(page_size: int) -> None:
    torch.manual_seed(2)
    rows = PagedRows([(140, 1), (65, 1), (3, 5), (50, 9)], 2, page_size=page_size)
    caches = [torch.full((rows.num_pages * page_size, 2, 16), float("nan"), device=DEVICE) for _ in range(2)]
    for cache in caches:
        for row in range(len(rows.starts)):
            cache[rows.places(row)] = torch.randn(len(rows.places(row)), 2, 16, device=DEVICE)
    q = torch.randn(16, 4, 16, device=DEVICE)
    tiles = dataclasses.replace(in_splits(3, keys=32), extend=AttendTile(16, 32, 4, 3))
    out = PagedAttend(tiles)(q, caches[0], caches[1], on_device(rows.batch, DEVICE), SCALE)
    for row, start in enumerate(rows.starts.tolist()):
        tokens, places = rows.queries(row), rows.places(row)
        expected = definition(q[tokens], caches[0][places], caches[1][places], start)
        torch.testing.assert_close(out[tokens].double(), expected, rtol=2e-5, atol=2e-5)


def test_blocks_of_pages_before_a_window_are_not_read() -> None:
    """They cost no time, and hold whatever they hold."""
    rows, rule = PagedRows([(200, 1), (90, 20)], 1), of_window(30, 1.0)(4)
    caches = [torch.randn(rows.num_pages * PAGE_SIZE, 2, 16, device=DEVICE) for _ in range(2)]
    q, batch = torch.randn(21, 4, 16, device=DEVICE), on_device(rows.batch, DEVICE)
    tiles = dataclasses.replace(in_splits(2, keys=32), extend=AttendTile(16, 32, 4, 3))
    expected = PagedAttend(tiles)(q, *caches, batch, SCALE, rule)
    for row, first_seen in ((0, 171), (1, 61)):
        for cache in caches:
            cache[rows.places(row)[: first_seen // 32 * 32]] = torch.nan
    assert torch.equal(PagedAttend(tiles)(q, *caches, batch, SCALE, rule), expected)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("splits", [1, 4])
def test_a_row_of_length_zero_gives_zeros(splits: int, rule: str) -> None:
    rows = PagedRows([(5, 1), (9, 1)], 2)
    caches = [torch.randn(rows.num_pages * PAGE_SIZE, 1, 16, device=DEVICE) for _ in range(2)]
    q = torch.randn(2, 4, 16, device=DEVICE)
    batch = on_device(rows.batch, DEVICE)
    attend = PagedAttend(in_splits(splits))
    whole = attend(q, *caches, batch, SCALE, RULES[rule](4))
    batch.lengths_R[1] = 0
    with poisoned():
        out = attend(q, *caches, batch, SCALE, RULES[rule](4))
    assert torch.equal(out[0], whole[0]) and not out[1].any()


def test_tokens_past_the_last_row_are_left_alone() -> None:
    """A bucket may hold more tokens and rows than a step: rows without tokens come last."""
    rows = PagedRows([(4, 3)], 0)
    caches = [torch.randn(rows.num_pages * PAGE_SIZE, 1, 16, device=DEVICE) for _ in range(2)]
    batch = on_device(rows.batch, DEVICE)
    padded = dataclasses.replace(
        batch,
        query_start_R1=torch.tensor([0, 3, 3, 3], dtype=torch.int32, device=DEVICE),
        lengths_R=torch.tensor([7, 0, 0], dtype=torch.int32, device=DEVICE),
        pages_RP=batch.pages_RP.expand(3, -1).contiguous(),
    )
    q = torch.randn(40, 4, 16, device=DEVICE)
    attend = PagedAttend(DEFAULT)
    assert torch.equal(attend(q, *caches, padded, SCALE)[:3], attend(q[:3], *caches, batch, SCALE))
