"""The planner's rows: the sequence slots of all data indices as arrays, row = data x num_slots + slot."""

from __future__ import annotations

import numpy as np

from .requests import Request, State
from .slots import Int64, page_terms


class RowTable:
    """What the planner knows of every row. Lengths count tokens whose KV is computed.

    For a decoding row ``low`` is the acknowledged length and ``flying`` the decode steps in flight, so that its length
    after all plans sent lies in [low + flying, low + flying * advance], cut at ``limit`` - 1. For a row in prefill
    ``sent`` is the exact number of prompt tokens planned. ``on_rank`` says whether plans so far leave the slot active.
    """

    def __init__(self, num_data: int, num_slots: int, max_pages: int, num_cohorts: int) -> None:
        total = num_data * num_slots
        self.num_data, self.num_slots, self.num_cohorts = num_data, num_slots, num_cohorts
        self.state = np.zeros(total, np.uint8)
        self.on_rank = np.zeros(total, np.bool_)
        self.held = np.zeros(total, np.bool_)
        self.cohort = (np.arange(total) % num_slots % num_cohorts).astype(np.uint8)
        self.prompt = np.zeros(total, np.int64)
        self.limit = np.zeros(total, np.int64)
        self.low = np.zeros(total, np.int64)
        self.flying = np.zeros(total, np.int64)
        self.sent = np.zeros(total, np.int64)
        self.finish = np.zeros(total, np.uint8)
        self.drain_step = np.full(total, -1, np.int64)
        self.base = np.zeros(total, np.int64)
        self.order = np.zeros(total, np.int64)
        self.frontend = np.zeros(total, np.int16)
        self.handle = np.zeros(total, np.int64)
        self.num_pages = np.zeros(total, np.int64)
        self.pages = np.zeros((total, max_pages), np.int64)
        self.page_sum = np.zeros(total, np.uint64)
        self.requests: list[Request | None] = [None] * total
        self._used = [0] * num_data
        # Free slots per data index and cohort, lowest on top.
        self._free = [[list(range(cohort, num_slots, num_cohorts))[::-1] for cohort in range(num_cohorts)] for _ in range(num_data)]

    def data(self, row: int) -> int:
        return row // self.num_slots

    def slot(self, row: int) -> int:
        return row % self.num_slots

    def request(self, row: int) -> Request:
        request = self.requests[row]
        assert request is not None, f"row {row} has no request"
        return request

    def num_used(self, data: int) -> int:
        return self._used[data]

    def has_free(self, data: int) -> bool:
        return self._used[data] < self.num_slots

    def occupy(self, data: int, request: Request, pages: Int64) -> int:
        """Gives ``request`` a free row of ``data`` with global ``pages``; the row, whose ``page_sum`` is not yet right."""
        slot = max(self._free[data], key=len).pop()
        self._used[data] += 1
        row = data * self.num_slots + slot
        self.state[row] = State.STAGING
        self.held[row] = False
        self.prompt[row] = request.num_staged
        self.limit[row] = request.limit
        self.low[row] = self.flying[row] = self.sent[row] = 0
        self.finish[row] = 0
        self.base[row] = request.num_emitted
        self.order[row] = request.order
        self.frontend[row] = request.frontend
        self.handle[row] = request.handle
        count = len(pages)
        self.num_pages[row] = count
        self.pages[row, :count] = pages
        self.requests[row] = request
        request.row = row
        return row

    def sum_pages(self, rows: list[int], max_pool_pages: int) -> None:
        """Sets ``page_sum`` of rows that have just been occupied."""
        counts = self.num_pages[rows]
        starts = np.cumsum(counts) - counts
        owners = np.repeat(np.array(rows), counts)
        index = np.arange(len(owners)) - np.repeat(starts, counts)
        local = self.pages[owners, index] - owners // self.num_slots * max_pool_pages
        self.page_sum[rows] = np.add.reduceat(page_terms(owners % self.num_slots, index, local), starts)

    def append_pages(self, rows: Int64, pages: Int64, max_pool_pages: int) -> None:
        """Appends one global page to each of rows [n]."""
        count = self.num_pages[rows]
        self.pages[rows, count] = pages
        self.num_pages[rows] = count + 1
        local = pages - rows // self.num_slots * max_pool_pages
        self.page_sum[rows] += page_terms(rows % self.num_slots, count, local)

    def take_pages(self, row: int) -> Int64:
        """Empties the row's page table and returns what it held (global ids)."""
        pages = self.pages[row, : self.num_pages[row]].copy()
        self.num_pages[row] = 0
        self.page_sum[row] = 0
        return pages

    def vacate(self, row: int) -> None:
        """Makes the row free for the next request."""
        self.state[row] = State.FREE
        self.drain_step[row] = -1
        self.finish[row] = 0
        request = self.request(row)
        request.row = -1
        self.requests[row] = None
        self._used[self.data(row)] -= 1
        self._free[self.data(row)][int(self.cohort[row])].append(self.slot(row))
