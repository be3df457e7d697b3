"""The sequence slots of a rank on its device: the last token and the page table of each, at fixed
addresses.

The host knows lengths and pages by the plans; tokens it learns later. One more slot, ``scratch``,
takes what padding and idle rows write.

Suffixes: S1 slots and the scratch slot, P pages, R rows, R1 = R + 1, T tokens, N entries of page
tables.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ....kernels.reference.paged import PagedBatch
from ...protocol.arrays import Int32, Int64
from ...protocol.plan import Section
from ...protocol.slot_table import SlotTable
from ..page_pool import KVPool


@dataclass(frozen=True)
class Lane:
    """Rows of a step, or of one microbatch, on the device.

    slots_R, starts_R int64: the slot and the length before the step. lengths_R int32: with the
    step, 0 for padding. query_start_R1 int32. owners_T int64: the row of each token. given_T int64:
    tokens that the host knows, -1 where it is the slot's last; None: all are. ``query_starts`` and
    ``lengths`` as in ``PagedBatch``, empty in a captured step.
    """

    num_decode: int
    slots_R: Tensor
    starts_R: Tensor
    lengths_R: Tensor
    query_start_R1: Tensor
    owners_T: Tensor
    given_T: Tensor | None
    query_starts: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()


class DeviceSlots:
    """State of ``num_slots`` slots and the scratch slot, with page tables of ``max_pages``.
    ``nowhere``: a place and a page that pad a list of entries.
    """

    def __init__(self, num_slots: int, max_pages: int, pool: KVPool, device: torch.device) -> None:
        self.scratch = num_slots
        self.nowhere = num_slots * max_pages, pool.scratch  # an entry that changes nothing
        self._page_size = pool.page_size
        self.last_S1 = torch.zeros(num_slots + 1, dtype=torch.int64, device=device)
        self._pages_S1P = torch.zeros(num_slots + 1, max_pages, dtype=torch.int32, device=device)
        self._pages_S1P[num_slots] = pool.scratch

    def write_pages(self, places_N: Tensor, pages_N: Tensor) -> None:
        """Writes entries of page tables; ``places_N`` int64 as ``new_pages`` gives them."""
        self._pages_S1P.view(-1).index_copy_(0, places_N, pages_N)

    def inputs(self, lane: Lane, num_pages: int | None = None) -> tuple[Tensor, Tensor, PagedBatch]:
        """tokens_T int64, positions_T int64, and the batch. No row has more than ``num_pages``, if
        that is known.
        """
        owners_T, tokens_T = lane.owners_T, self.last_S1[lane.slots_R][lane.owners_T]
        if lane.given_T is not None:
            tokens_T = torch.where(lane.given_T >= 0, lane.given_T, tokens_T)
        first_T = lane.query_start_R1[:-1][owners_T]
        order_T = torch.arange(len(owners_T), device=owners_T.device)
        positions_T = order_T - first_T + lane.starts_R[owners_T]
        pages_RP = self._pages_S1P[:, :num_pages].index_select(0, lane.slots_R)
        blocks_T = positions_T // self._page_size
        write_T = pages_RP[owners_T, blocks_T] * self._page_size + positions_T % self._page_size
        batch = PagedBatch(
            num_decode=lane.num_decode,
            page_size=self._page_size,
            query_start_R1=lane.query_start_R1,
            lengths_R=lane.lengths_R,
            pages_RP=pages_RP,
            write_T=write_T,
            query_starts=lane.query_starts,
            lengths=lane.lengths,
        )
        return tokens_T, positions_T, batch


def new_pages(section: Section, table: SlotTable) -> tuple[Int64, Int32]:
    """The entries of page tables that ``section`` has written to ``table``: their places in the
    flattened table [S, P], and the pages.
    """
    max_pages = table.pages.shape[1]
    slots = [admit.slot for admit in section.admit]
    places = [np.arange(slot * max_pages, slot * max_pages + int(table.num_pages[slot])) for slot in slots]
    if section.pages_pairs:
        grown = np.frombuffer(section.pages_pairs, np.int32).reshape(-1, 2)[:, 0].astype(np.int64)
        for slot in np.setdiff1d(grown, slots).tolist():
            end = slot * max_pages + int(table.num_pages[slot])
            places.append(np.arange(end - int((grown == slot).sum()), end))
    if not places:
        return np.zeros(0, np.int64), np.zeros(0, np.int32)
    joined = np.concatenate(places)
    return joined, table.pages.reshape(-1)[joined]
