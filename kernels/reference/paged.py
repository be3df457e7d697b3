"""The rows of a step over paged caches: the positions that tokens are written to and rows read.

A cache tensor is [num_pages * page_size, ...]: position = page * page_size + offset. Positions past
a row's length are gathered and masked, so a cache must be allocated zeroed and hold finite values.

T tokens  R rows  P pages of the longest row  R1 = R + 1
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Decode rows are padded to the longest of their group. Rows of less than half its pages form
# another group, unless the longest has at most this many pages: then padding costs less than one
# more kernel call.
_SMALL_GROUP_PAGES = 16


@dataclass(frozen=True)
class DecodeGroup:
    """Decode rows attended together. ``rows`` is None when the group is all of them in order.

    pages [rows * P] int32: the page tables, flattened. mask [rows, 1, 1, P * page_size] bool: true
    where a row may look.
    """

    rows: Tensor | None
    num_rows: int
    pages: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Extend:
    """A row with several query tokens: tokens [begin, end) of the step, at positions [start,
    length) of its sequence.
    """

    begin: int
    end: int
    start: int
    length: int
    pages: Tensor


@dataclass(eq=False)
class PagedBatch:
    """The rows of one step: ``num_decode`` rows of one token each (token i is row i's), then the
    extends.

    query_start_R1 int32: first token of each row, then T. lengths_R int32: KV length of each row,
    this step's tokens included. pages_RP int32: page tables, padded with any valid page. write_T
    int64: cache position of each token. ``query_starts`` and ``lengths`` are copies on the host,
    for eager execution. ``selection``: the positions that the last indexer chose for these rows,
    None for all; layers without an indexer of their own look at them.
    """

    num_decode: int
    page_size: int
    query_start_R1: Tensor
    lengths_R: Tensor
    pages_RP: Tensor
    write_T: Tensor
    query_starts: tuple[int, ...]
    lengths: tuple[int, ...]
    selection: Selection | None = None

    @cached_property
    def decode_groups(self) -> tuple[DecodeGroup, ...]:
        """The decode rows, grouped by length; made once per step and shared by the layers."""
        num_pages = [self._num_pages(length) for length in self.lengths[: self.num_decode]]
        groups: list[list[int]] = []
        for row in sorted(range(self.num_decode), key=lambda row: -num_pages[row]):
            longest = num_pages[groups[-1][0]] if groups else 0
            if not groups or (longest > _SMALL_GROUP_PAGES and 2 * num_pages[row] < longest):
                groups.append([])
            groups[-1].append(row)
        if len(groups) == 1:
            return (self._group(None, num_pages[groups[0][0]]),)
        return tuple(self._group(sorted(rows), max(num_pages[row] for row in rows)) for rows in groups)

    def extends(self) -> Iterator[Extend]:
        """The rows past ``num_decode``."""
        for row in range(self.num_decode, len(self.lengths)):
            begin, end, length = self.query_starts[row], self.query_starts[row + 1], self.lengths[row]
            pages = self.pages_RP[row, : self._num_pages(length)]
            yield Extend(begin, end, length - (end - begin), length, pages)

    def _num_pages(self, length: int) -> int:
        return -(-length // self.page_size)

    def _group(self, rows: list[int] | None, num_pages: int) -> DecodeGroup:
        index = None if rows is None else torch.tensor(rows, device=self.pages_RP.device)
        pages, lengths = self.pages_RP[: self.num_decode], self.lengths_R[: self.num_decode]
        if index is not None:
            pages, lengths = pages[index], lengths[index]
        offsets = torch.arange(num_pages * self.page_size, device=lengths.device)
        mask = offsets < lengths[:, None]
        return DecodeGroup(index, len(lengths), pages[:, :num_pages].reshape(-1), mask[:, None, None, :])


@dataclass(frozen=True)
class Selection:
    """The positions that some tokens look at: for each of ``tokens_N`` int64 of the step the first
    counts_N int32 of places_NK int64, cache positions in the order of the sequence. ``rest``: the
    rows of all other tokens, which look at every position, and ``rest_tokens`` int64 those tokens;
    None where there are none.
    """

    tokens_N: Tensor
    places_NK: Tensor
    counts_N: Tensor
    rest: PagedBatch | None
    rest_tokens: Tensor


def build_batch(
    starts_R: NDArray[np.int64],
    counts_R: NDArray[np.int64],
    num_decode: int,
    pages_RP: NDArray[np.int32],
    page_size: int,
    device: torch.device | str = "cpu",
) -> tuple[PagedBatch, Tensor]:
    """A batch from host arrays, and positions_T int64, the position of each token in its sequence.

    starts_R: KV length of each row before the step. counts_R: tokens each row computes, one for
    decode rows.
    """
    assert (counts_R[:num_decode] == 1).all(), "a decode row computes one token"
    lengths = starts_R + counts_R
    if num_decode == len(counts_R):
        query_start = np.arange(num_decode + 1)
        owners = np.arange(num_decode)
        positions = starts_R
    else:
        query_start = np.zeros(len(counts_R) + 1, np.int64)
        counts_R.cumsum(out=query_start[1:])
        owners = np.repeat(np.arange(len(counts_R)), counts_R)
        positions = np.arange(len(owners)) + (starts_R - query_start[:-1])[owners]
    blocks = positions // page_size
    write = (pages_RP[owners, blocks] - blocks) * page_size + positions

    def move(array: NDArray[Any], dtype: type[np.generic]) -> Tensor:
        return torch.from_numpy(array.astype(dtype, order="C", copy=False)).to(device)

    batch = PagedBatch(
        num_decode=num_decode,
        page_size=page_size,
        query_start_R1=move(query_start, np.int32),
        lengths_R=move(lengths, np.int32),
        pages_RP=move(pages_RP, np.int32),
        write_T=move(write, np.int64),
        query_starts=tuple(query_start.tolist()),
        lengths=tuple(lengths.tolist()),
    )
    return batch, move(positions, np.int64)


def write_entries(cache: Tensor, write_T: Tensor, entries: Tensor) -> None:
    """Stores the entries [T, ...] of a step at their positions, in the dtype of the cache."""
    cache.index_copy_(0, write_T, entries.to(cache.dtype))


def copy_pages(caches: Sequence[Tensor], sources_N: Tensor, targets_N: Tensor, page_size: int) -> None:
    """Copies page sources_N[i] to page targets_N[i] in every cache. Both are int64. Targets are
    distinct and none is a source; a target of -1 pads a list of fixed length and is skipped.
    """
    real_N = (targets_N >= 0).nonzero()[:, 0]
    for cache in caches:
        by_page = cache.view(-1, page_size * cache[0].numel())
        by_page[targets_N[real_N]] = by_page[sources_N[real_N]]


def gather_pages(cache: Tensor, pages: Tensor, page_size: int, dtype: torch.dtype) -> Tensor:
    """The entries of ``pages`` [n] in order: [n * page_size, ...] of a cache [num_pages *
    page_size, ...], as ``dtype``.
    """
    by_page = cache.view(-1, page_size * cache[0].numel())
    return by_page.index_select(0, pages).view(-1, *cache.shape[1:]).to(dtype)
