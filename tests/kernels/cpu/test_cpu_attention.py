"""Compiled attention over pages of every format against the reference.
``reference/test_attention.py`` checks the reference against the definition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import pytest
import torch
from torch import Tensor

from lockstep.kernels.cpu import attention as cpu_attention
from lockstep.kernels.cpu.codegen import crew
from lockstep.kernels.reference import attention as reference, kv_entries
from lockstep.kernels.reference.attention import AttentionRule
from lockstep.kernels.reference.paged import PagedBatch
from support.grids import pairwise
from support.kernels.fp8_entries import heads_in
from support.kernels.paged_rows import PagedRows

CASES = {
    "decode": ([(0, 1), (17, 1), (63, 1), (64, 1), (129, 1)], 5),
    "split": ([(1100, 1), (2, 1), (511, 1), (512, 1)], 4),
    "both": ([(5, 1), (600, 1), (0, 20), (11, 3)], 2),
    "extends": ([(0, 9), (30, 12), (64, 1)], 0),
    "blocks of queries": ([(70, 300)], 0),
    "nothing": ([], 0),
}
FORMATS: dict[str, Callable[[Tensor], Tensor]] = {
    "fp32": lambda x: x.clone(),
    "bf16": lambda x: x.bfloat16(),
    "fp8": kv_entries.encode_heads,
}
RULES = {
    "all": lambda heads: AttentionRule(),
    "window of 1": lambda heads: AttentionRule(1),
    "window of 100": lambda heads: AttentionRule(100),
    "window of 600, sinks": lambda heads: AttentionRule(600, torch.linspace(-4, 4, heads)),
    "window of 20, sinks": lambda heads: AttentionRule(20, torch.linspace(-4, 40, heads)),
    "sinks": lambda heads: AttentionRule(0, torch.linspace(-200, 200, heads)),
}
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
# Query heads, key heads, dim, page size. Pages of 64 and more are read in place; 40 query heads per
# key head exceed a tile; dims of 64 and 128 are decoded as bytes.
SHAPES = [(6, 1, 20, 8), (6, 6, 20, 64), (6, 2, 96, 40), (40, 1, 32, 64), (4, 2, 64, 128), (16, 2, 128, 16)]


def filled(rows: PagedRows, kv_heads: int, dim: int, kv_format: str) -> list[Tensor]:
    """Keys and values, with large numbers at places that no row may read."""
    caches = [torch.full((rows.num_pages * rows.page_size, kv_heads, dim), 1e3) for _ in range(2)]
    for row in range(len(rows.starts)):
        for cache in caches:
            cache[rows.places(row)] = torch.randn(len(rows.places(row)), kv_heads, dim)
    return [FORMATS[kv_format](cache) for cache in caches]


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = crew.num_threads()
    yield crew.set_num_threads
    crew.set_num_threads(before)


@pairwise({"case": CASES, "shape": SHAPES, "rule": RULES, "kv_format, dtype": product(FORMATS, TOLERANCES)})
def test_as_the_reference(
    case: str, shape: tuple[int, int, int, int], rule: str, kv_format: str, dtype: torch.dtype
) -> None:
    heads, kv_heads, dim, page_size = shape
    torch.manual_seed(0)
    rows = PagedRows(*CASES[case], page_size=page_size)
    caches = filled(rows, kv_heads, dim, kv_format)
    numbers = [heads_in(cache, kv_heads, dim) if kv_format == "fp8" else cache.float() for cache in caches]
    q = torch.randn(int(rows.counts.sum()), heads, dim).to(dtype)
    own = RULES[rule](heads)
    out = cpu_attention.attend(q, *caches, rows.batch, dim**-0.5, own)
    expected = reference.attend(q.float(), *numbers, rows.batch, dim**-0.5, own)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


def test_large_scores_do_not_overflow() -> None:
    """The running softmax restarts when a later block, or a later part of the row, holds a much
    larger score.
    """
    for largest in (150, 700):
        rows = PagedRows([(800, 1)], 1)
        k, v = (
            torch.zeros(rows.num_pages * rows.page_size, 1, 8),
            torch.randn(rows.num_pages * rows.page_size, 1, 8),
        )
        k[rows.places(0)[largest]], k[rows.places(0)[10]] = 300.0, -300.0
        out = cpu_attention.attend(torch.ones(1, 2, 8), k, v, rows.batch, 1.0)
        torch.testing.assert_close(out[0, 0], v[rows.places(0)[largest], 0])


def test_nan_stays_visible() -> None:
    rows = PagedRows([(70, 1)], 1)
    for spoiled in range(2):
        caches = filled(rows, 2, 8, "fp32")
        caches[spoiled][rows.places(0)[3], 1, 5] = torch.nan
        out = cpu_attention.attend(torch.ones(1, 4, 8), *caches, rows.batch, 1.0)
        assert out[0, :2].isfinite().all() and out[0, 2:].isnan().any(-1).all()


@pytest.mark.parametrize("dim", [20, 64])
def test_a_nan_scale_stays_visible_and_affects_only_queries_that_see_it(dim: int) -> None:
    """The NaN is in the keys of position 3 of 7. Earlier queries in the same chunk do not read
    them, nor do other heads.
    """
    rows = PagedRows([(0, 7)], 0, page_size=64)
    keys, values = (torch.randn(rows.num_pages * 64, 2, dim) for _ in range(2))
    keys[rows.places(0)[3], 1, 5] = torch.nan
    out = cpu_attention.attend(
        torch.ones(7, 4, dim).bfloat16(),
        *(kv_entries.encode_heads(x) for x in (keys, values)),
        rows.batch,
        0.1,
    )
    assert out[:, :2].isfinite().all() and out[:3].isfinite().all() and out[3:, 2:].isnan().all()


def test_heads_of_very_different_sizes_share_a_cache() -> None:
    """Scales of 1e-6 and 1e4 times those of other positions, in scores and in sums."""
    rows = PagedRows([(150, 1), (0, 70)], 1, page_size=64)
    sizes = torch.logspace(-6, 4, rows.num_pages * 64)[torch.randperm(rows.num_pages * 64)].view(-1, 1, 1)
    caches = [kv_entries.encode_heads(torch.randn(len(sizes), 2, 64) * sizes**part) for part in (0.2, 1.0)]
    q = torch.randn(71, 8, 64).bfloat16()
    expected = reference.attend(q.float(), *(heads_in(cache, 2, 64) for cache in caches), rows.batch, 0.1)
    out = cpu_attention.attend(q, *caches, rows.batch, 0.1).float()
    assert (out - expected).norm() < 5e-3 * expected.norm()


@pytest.mark.parametrize("rule", [AttentionRule(), AttentionRule(90, torch.linspace(-3, 3, 8))])
@pytest.mark.parametrize("kv_format", ["bf16", "fp8"])
def test_a_row_depends_neither_on_those_beside_it_nor_on_threads(
    kv_format: str, rule: AttentionRule, threads: Callable[[int], None]
) -> None:
    lengths = [(1300, 1), (70, 1), (9, 1), (40, 100)]
    rows = PagedRows(lengths, 3, page_size=64)
    caches = filled(rows, 4, 64, kv_format)
    q = torch.randn(103, 8, 64).bfloat16()
    threads(1)
    expected = cpu_attention.attend(q, *caches, rows.batch, 0.25, rule)
    for count in (2, 3):
        threads(count)
        assert torch.equal(cpu_attention.attend(q, *caches, rows.batch, 0.25, rule), expected)
    for row in range(4):
        alone, tokens = _alone(rows, row), rows.queries(row)
        assert torch.equal(cpu_attention.attend(q[tokens], *caches, alone, 0.25, rule), expected[tokens])


def test_blocks_of_pages_before_a_window_are_not_read() -> None:
    """They cost no time, and hold whatever they hold."""
    rows, rule = PagedRows([(700, 1), (130, 70)], 1, page_size=64), AttentionRule(60)
    caches = filled(rows, 2, 64, "bf16")
    q = torch.randn(71, 4, 64).bfloat16()
    expected = cpu_attention.attend(q, *caches, rows.batch, 0.2, rule)
    for row, first_seen in ((0, 641), (1, 71)):
        for cache in caches:
            cache[rows.places(row)[: first_seen // 64 * 64]] = torch.nan
    assert torch.equal(cpu_attention.attend(q, *caches, rows.batch, 0.2, rule), expected)


def _alone(rows: PagedRows, row: int) -> PagedBatch:
    batch, count = rows.batch, int(rows.counts[row])
    return PagedBatch(
        num_decode=int(count == 1),
        page_size=batch.page_size,
        query_start_R1=torch.tensor([0, count], dtype=torch.int32),
        lengths_R=batch.lengths_R[row : row + 1],
        pages_RP=batch.pages_RP[row : row + 1],
        write_T=batch.write_T[rows.queries(row)],
        query_starts=(0, count),
        lengths=batch.lengths[row : row + 1],
    )
