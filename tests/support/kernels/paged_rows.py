"""Rows over a shuffled page pool, with what each row's cache should hold."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from lockstep.kernels.reference.paged import PagedBatch, build_batch

PAGE_SIZE = 8


class PagedRows:
    """Rows given as (length before the step, tokens in the step); ``num_decode`` of them come first
    with one token.
    """

    def __init__(
        self, rows: list[tuple[int, int]], num_decode: int, seed: int = 0, page_size: int = PAGE_SIZE
    ) -> None:
        self.page_size = page_size
        self.starts = np.array([start for start, _ in rows], np.int64)
        self.counts = np.array([count for _, count in rows], np.int64)
        needed = -(-(self.starts + self.counts) // self.page_size)
        self.num_pages = int(needed.sum()) + 3
        order = np.random.default_rng(seed).permutation(self.num_pages).astype(np.int32)
        self.pages = np.zeros((len(rows), int(needed.max(initial=1))), np.int32)
        used = 0
        for row, count in enumerate(needed):
            self.pages[row, :count] = order[used : used + count]
            used += count
        self.batch: PagedBatch
        self.batch, _ = build_batch(self.starts, self.counts, num_decode, self.pages, self.page_size)

    def places(self, row: int) -> Tensor:
        """Cache positions of the row's tokens in order, those of this step included."""
        positions = np.arange(self.starts[row] + self.counts[row])
        return torch.from_numpy(
            self.pages[row, positions // self.page_size].astype(np.int64) * self.page_size
            + positions % self.page_size
        )

    def queries(self, row: int) -> slice:
        begin = int(self.counts[:row].sum())
        return slice(begin, begin + int(self.counts[row]))


def on_device(batch: PagedBatch, device: torch.device) -> PagedBatch:
    """The batch of a step that knows no length on the host: whoever looks for one there fails."""
    tensors = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    moved = {
        name: value.to(device) if isinstance(value, Tensor) else value for name, value in tensors.items()
    }
    return PagedBatch(**(moved | {"query_starts": (), "lengths": ()}))
