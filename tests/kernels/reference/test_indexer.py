"""Attention over the positions that an indexer chooses, against its definition in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lockstep.kernels.reference import indexer
from lockstep.kernels.reference.column import Reference
from lockstep.kernels.reference.indexer import IndexNorm, best_positions
from lockstep.kernels.reference.kv_entries import (
    decode_heads,
    decode_latents,
    encode_heads,
    encode_latents,
)
from lockstep.kernels.reference.rope import angles, frequencies
from lockstep.kernels.table import Column, ops_of
from support.grids import pairwise
from support.kernels.paged_rows import PAGE_SIZE, PagedRows

HEADS, NOPE, ROPE, VALUE, LATENT, SCALE = 4, 12, 6, 8, 20, 0.25
INDEX_HEADS, INDEX, TOP_K = 3, 12, 10

CASES = {
    "decode": ([(0, 1), (9, 1), (10, 1), (47, 1)], 4),
    "extends": ([(0, 9), (0, 31), (4, 20), (30, 12), (7, 1)], 0),
    "both": ([(5, 1), (64, 1), (0, 20), (11, 3)], 2),
    "all see few": ([(5, 1), (0, 8)], 1),
    "none sees few": ([(20, 1), (30, 7)], 1),
    "nothing": ([], 0),
}


def definition(q: Tensor, weights: Tensor, keys: Tensor, start: int) -> list[list[int]]:
    """The positions that each query of a row chooses."""
    scores = torch.einsum("tj,tjl->tl", weights.double(), (q.double() @ keys.double().T).relu())
    chosen = []
    for number, row in enumerate(scores.tolist()):
        seen = start + number + 1
        best = sorted(range(seen), key=lambda position: (-row[position], position))[:TOP_K]
        chosen.append(sorted(best))
    return chosen


def attended(q: Tensor, latents: Tensor, expand: Tensor, positions: list[int]) -> Tensor:
    """Attention of one query [H, N + E] over some positions: [H, V]."""
    c, k_rope = latents[positions].double().split([LATENT, ROPE], -1)
    kv = torch.einsum("lc,hpc->lhp", c, expand.double())
    k = torch.cat([kv[..., :NOPE], k_rope[:, None].expand(-1, HEADS, -1)], -1)
    weights = (torch.einsum("hd,lhd->hl", q.double(), k) * SCALE).softmax(-1)
    return torch.einsum("hl,lhv->hv", weights, kv[..., NOPE:])


@pairwise({"case": CASES, "kv_format": ["fp32", "fp8"], "column": ["reference", "cpu"], "at_once": [1, 9999]})
def test_equals_the_definition(
    case: str, kv_format: str, column: Column, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Entries that the tokens of this step wrote are among those read. ``at_once``: bytes of scores
    and entries that are made at once.
    """
    monkeypatch.setattr(indexer, "BLOCK_BYTES", at_once)
    torch.manual_seed(3)
    ops: Reference = ops_of(column)
    rows = PagedRows(*CASES[case])
    num_tokens, places = int(rows.counts.sum()), rows.num_pages * PAGE_SIZE
    c, k_rope = torch.randn(places, LATENT + ROPE).split([LATENT, ROPE], -1)
    keys = torch.randn(places, 1, INDEX)
    latents, latent_numbers = torch.cat([c, k_rope], -1), torch.cat([c, k_rope], -1)
    key_cache, key_numbers = keys, keys
    if kv_format == "fp8":
        latents, key_cache = encode_latents(c, k_rope), encode_heads(keys)
        latent_numbers = decode_latents(latents, LATENT, torch.float32)
        key_numbers = decode_heads(key_cache, INDEX, torch.float32)
    q_nope, q_rope = torch.randn(num_tokens, HEADS, NOPE), torch.randn(num_tokens, HEADS, ROPE)
    q_index, weights = torch.randn(num_tokens, INDEX_HEADS, INDEX), torch.randn(num_tokens, INDEX_HEADS)
    expand = torch.randn(HEADS, NOPE + VALUE, LATENT) * LATENT**-0.5
    selection = ops.select_positions(q_index, weights, key_cache, rows.batch, TOP_K)
    assert (selection is None) == (case in ("all see few", "nothing"))
    out = ops.mla_attend_selected(q_nope, q_rope, latents, expand, rows.batch, SCALE, selection)
    assert out.shape == (num_tokens, HEADS, VALUE)
    for row, start in enumerate(rows.starts.tolist()):
        tokens, at = rows.queries(row), rows.places(row)
        chosen = definition(q_index[tokens], weights[tokens], key_numbers[at, 0], start)
        for token, positions in zip(range(tokens.start, tokens.stop), chosen, strict=True):
            assert len(positions) == min(TOP_K, start + 1 + token - tokens.start)
            query = torch.cat([q_nope[token], q_rope[token]], -1)
            expected = attended(query, latent_numbers[at], expand, positions)
            torch.testing.assert_close(out[token].double(), expected, rtol=2e-5, atol=2e-5)


def test_of_equal_scores_the_earlier_position_is_chosen() -> None:
    scores = torch.tensor([[1.0, 2.0, 1.0, 1.0, 2.0, 9.0]])
    for seen, chosen in ((5, [0, 1, 4]), (6, [1, 4, 5]), (3, [0, 1, 2]), (2, [0, 1, 0])):
        assert best_positions(scores, torch.tensor([seen]), 3).tolist() == [chosen]


def test_scores_that_are_no_numbers_are_the_lowest() -> None:
    """A row whose hidden state has gone bad still has as many positions as the others."""
    nan, inf = float("nan"), float("inf")
    scores = torch.tensor([[nan, 1.0, nan, nan, inf], [nan] * 5, [-inf, -inf, 0.0, nan, 3.0]])
    assert best_positions(scores, torch.tensor([5, 4, 4]), 3).tolist() == [[0, 1, 4], [0, 1, 2], [0, 1, 2]]


def test_keys_are_normed_and_rotated_by_halves_in_their_first_part() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, INDEX_HEADS, INDEX), torch.randn(2, INDEX)
    norm = IndexNorm(torch.randn(INDEX), torch.randn(INDEX), 1e-6)
    cache, turn = torch.zeros(8, 1, INDEX), angles(torch.tensor([0, 5]), frequencies(ROPE, 100.0))
    turned = ops_of("reference").rotate_and_write_index(q, k, norm, turn, cache, torch.tensor([6, 1]))
    centred = k - k.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight_I + norm.bias_I
    low, high = normed[1, : ROPE // 2], normed[1, ROPE // 2 : ROPE]
    cos, sin = turn.cos_T1F[1, 0], turn.sin_T1F[1, 0]
    expected = torch.cat([low * cos - high * sin, high * cos + low * sin, normed[1, ROPE:]])
    torch.testing.assert_close(cache[[6, 1], 0], torch.stack([normed[0], expected]))
    torch.testing.assert_close(turned[0], q[0])
    torch.testing.assert_close(turned[1, :, ROPE:], q[1, :, ROPE:])
    torch.testing.assert_close(turned[1, :, 0], q[1, :, 0] * cos[0] - q[1, :, ROPE // 2] * sin[0])
