"""Grouped-query attention over a paged cache against its definition in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from lockstep.kernels.reference.attention import AttentionRule, attend
from lockstep.kernels.reference.paged import write_entries
from support.grids import pairwise
from support.kernels.paged_rows import PAGE_SIZE, PagedRows

DIM, SCALE = 16, 0.3

# The model's dtype, the cache's, and the tolerance. The definition reads the cache's contents, so
# their rounding is no error.
DTYPES = [
    (torch.float32, torch.float32, 2e-5),
    (torch.bfloat16, torch.bfloat16, 3e-2),
    (torch.float32, torch.bfloat16, 2e-5),
    (torch.bfloat16, torch.float32, 3e-2),
]

CASES = {
    "decode": ([(0, 1), (17, 1), (8, 1)], 3),
    "decode far apart": ([(700, 1), (2, 1), (600, 1), (90, 1)], 4),
    "extends": ([(0, 9), (0, 1), (30, 12), (7, 1)], 0),
    "blocks over a prefix": ([(21, 1100)], 0),
    "both": ([(5, 1), (64, 1), (0, 20), (11, 3)], 2),
    "nothing": ([], 0),
}


RULES = {
    "all": AttentionRule(),
    "window of 1": AttentionRule(1),
    "window of 11": AttentionRule(11),
    "window of 80, sinks": AttentionRule(80, torch.linspace(-4, 4, 6)),
    "sinks": AttentionRule(0, torch.linspace(-2, 6, 6)),
}


def definition(
    q_THD: Tensor, k_LKD: Tensor, v_LKD: Tensor, start: int, rule: AttentionRule = RULES["all"]
) -> Tensor:
    """Each query at position p sees keys 0..p of its head's group, the last of them where there is
    a window. A sink adds its exponential to the divisor of every query of its head.
    """
    group = q_THD.shape[1] // k_LKD.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k_LKD, v_LKD))
    scores = torch.einsum("thd,lhd->htl", q_THD.double(), k) * SCALE
    position = torch.arange(len(q_THD))[:, None] + start
    scores = scores.masked_fill(torch.arange(len(k)) > position, -torch.inf)
    if rule.window:
        scores = scores.masked_fill(torch.arange(len(k)) <= position - rule.window, -torch.inf)
    shares = scores.exp()
    total = shares.sum(-1, keepdim=True)
    if rule.sinks_H is not None:
        total = total + rule.sinks_H.double().exp()[:, None, None]
    return torch.einsum("htl,lhd->thd", shares / total, v)


@pairwise({"case": CASES, "dtype, cache_dtype, tolerance": DTYPES, "num_kv_heads": [1, 2, 6], "rule": RULES})
def test_equals_the_definition(
    case: str, num_kv_heads: int, rule: str, dtype: torch.dtype, cache_dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(0)
    rows = PagedRows(*CASES[case])
    num_tokens = int(rows.counts.sum())
    # Other pages and places past a row's end hold large values, so that a wrong mask shows.
    k_cache, v_cache = (
        torch.full((rows.num_pages * PAGE_SIZE, num_kv_heads, DIM), 1e3, dtype=cache_dtype) for _ in range(2)
    )
    for row in range(len(rows.starts)):
        past = rows.places(row)[: int(rows.starts[row])]
        k_cache[past], v_cache[past] = (
            torch.randn(len(past), num_kv_heads, DIM).to(cache_dtype) for _ in range(2)
        )
    q = torch.randn(num_tokens, 6, DIM).to(dtype)
    k, v = (torch.randn(num_tokens, num_kv_heads, DIM).to(dtype) for _ in range(2))
    untouched = k_cache.clone()
    write_entries(k_cache, rows.batch.write_T, k)
    write_entries(v_cache, rows.batch.write_T, v)
    out = attend(q, k_cache, v_cache, rows.batch, SCALE, RULES[rule])
    assert (out.shape, out.dtype) == (q.shape, dtype)
    for row, start in enumerate(rows.starts.tolist()):
        tokens, places = rows.queries(row), rows.places(row)
        assert torch.equal(k_cache[places[start:]], k[tokens].to(cache_dtype))
        untouched[places[start:]] = k[tokens].to(cache_dtype)
        expected = definition(q[tokens], k_cache[places], v_cache[places], start, RULES[rule])
        torch.testing.assert_close(out[tokens].double(), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(k_cache, untouched)
