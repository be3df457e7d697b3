"""The Triton column of the indexer's ops against the reference, with lengths known on the host and
without.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lockstep.kernels.formats.kv_format import index_entry
from lockstep.kernels.reference import indexer as reference
from lockstep.kernels.reference.indexer import IndexNorm
from lockstep.kernels.reference.kv_entries import decode_heads, encode_heads
from lockstep.kernels.reference.paged import Selection
from lockstep.kernels.reference.rope import angles, frequencies
from lockstep.kernels.table import ops_of
from lockstep.kernels.triton import indexer
from support.grids import pairwise
from support.kernels.paged_rows import PAGE_SIZE, PagedRows, on_device
from support.kernels.poison import DEVICE

HEADS, NOPE, ROPE, VALUE, LATENT, TOP_K = 4, 12, 6, 8, 20, 10
CASES = {
    "decode": ([(0, 1), (9, 1), (10, 1), (47, 1)], 4),
    "both": ([(5, 1), (64, 1), (0, 20), (11, 3)], 2),
    "padding": ([(30, 1), (0, 0), (3, 1)], 0),
    "all see few": ([(5, 1), (0, 8)], 1),
    "nothing": ([], 0),
}


def chosen(selection: Selection, token: int) -> set[int]:
    [at] = (selection.tokens_N == token).nonzero()[:, 0].tolist()
    return set(selection.places_NK[at, : int(selection.counts_N[at])].tolist())


def places_of(batch_rows: PagedRows, token: int) -> set[int]:
    """All places that a token sees."""
    row = int((batch_rows.counts.cumsum() <= token).sum())
    queries = batch_rows.queries(row)
    seen = int(batch_rows.starts[row]) + token - queries.start + 1
    return set(batch_rows.places(row)[:seen].tolist())


@pairwise(
    {
        "case": CASES,
        "heads, dim": [(3, 12), (16, 32)],
        "dtype": [torch.float32, torch.bfloat16],
        "eight": [False, True],
        "known": [False, True],
    }
)
def test_the_positions_and_what_attention_makes_of_them(
    case: str, heads: int, dim: int, dtype: torch.dtype, eight: bool, known: bool
) -> None:
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rows = PagedRows(*CASES[case])
    batch = on_device(rows.batch, DEVICE)
    if known:
        batch = replace(batch, query_starts=rows.batch.query_starts, lengths=rows.batch.lengths)
    num_tokens, places = int(rows.counts.sum()), rows.num_pages * PAGE_SIZE
    keys = random(places, 1, dim).to(dtype)
    keys = encode_heads(keys) if eight else keys
    latents, expand = (
        random(places, LATENT + ROPE).to(dtype),
        (random(HEADS, NOPE + VALUE, LATENT) * 0.2).to(dtype),
    )
    q, weights = random(num_tokens, heads, dim).to(dtype), random(num_tokens, heads)
    q_nope, q_rope = random(num_tokens, HEADS, NOPE).to(dtype), random(num_tokens, HEADS, ROPE).to(dtype)
    expected = reference.select_positions(q, weights, keys, rows.batch, TOP_K)
    on_card = (q.to(DEVICE), weights.to(DEVICE), keys.to(DEVICE))
    found = indexer.select_positions(*on_card, batch, TOP_K)
    if known:
        assert (found is None) == (expected is None and not batch.num_decode)
    assert found is None or len(found.tokens_N) + len(found.rest_tokens) == num_tokens
    for token in found.tokens_N.tolist() if found is not None else ():
        own = None if expected is None else (expected.tokens_N == token).any()
        assert chosen(found, token) == (
            chosen(expected, token) if expected is not None and own else places_of(rows, token)
        )
    attend = (q_nope, q_rope, latents, expand)
    out = ops_of("triton").mla_attend_selected(*(x.to(DEVICE) for x in attend), batch, 0.2, found)
    wanted = ops_of("reference").mla_attend_selected(*attend, rows.batch, 0.2, expected)
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(out.cpu(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("eight", "interleaved"), [(False, False), (True, False), (True, True)])
def test_keys_are_written_as_the_reference_writes_them(eight: bool, interleaved: bool) -> None:
    """But for tokens with a negative place."""
    torch.manual_seed(0)
    heads, dim, turned = 3, 12, 6
    q, k = torch.randn(4, heads, dim), torch.randn(4, dim)
    norm = IndexNorm(torch.randn(dim), torch.randn(dim), 1e-6)
    turn, write = angles(torch.tensor([0, 5, 9, 2]), frequencies(turned, 100.0)), torch.tensor([6, 1, 7, 3])
    kind, cache_dtype = ("fp8", torch.uint8) if eight else ("fp32", torch.float32)
    entry: Any = index_entry(kind, dim)
    caches = [torch.full((8, *entry), 7, dtype=cache_dtype) for _ in range(2)]
    expected = reference.rotate_and_write_index(q, k, norm, turn, caches[0], write, interleaved)
    places = torch.tensor([6, 1, -1, 3])
    moved = (x.to(DEVICE) for x in (norm.weight_I, norm.bias_I))
    on_card = replace(turn, cos_T1F=turn.cos_T1F.to(DEVICE), sin_T1F=turn.sin_T1F.to(DEVICE))
    cache = caches[1].to(DEVICE)
    out = indexer.rotate_and_write_index(
        q.to(DEVICE), k.to(DEVICE), IndexNorm(*moved, 1e-6), on_card, cache, places.to(DEVICE), interleaved
    )
    torch.testing.assert_close(out.cpu(), expected)
    found = cache.cpu()
    assert torch.equal(found[7], caches[1][7]) and not torch.equal(caches[0][7], caches[1][7])
    if eight:
        found, caches[0] = (decode_heads(x, dim, torch.float32) for x in (found, caches[0]))
    rest = [0, 1, 2, 3, 4, 5, 6]
    torch.testing.assert_close(found[rest], caches[0][rest], rtol=0.13, atol=0.02)
