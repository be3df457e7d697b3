"""The planner's rows: the sequence slots of all data indices as arrays, row = data x num_slots +
slot.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..protocol.arrays import Int64, ragged
from ..protocol.checksum import page_terms
from .request import Request, State

_Rows = TypeVar("_Rows", int, Int64)


class RowTable:
    """What the planner knows of every row. Lengths count tokens whose KV is computed.

    The length of a decoding row after all plans sent lies in [``low``, ``high``], cut at ``limit``
    - 1: a plan moves both on, a result brings them together. For a row in prefill ``sent`` is the
    exact number of prompt tokens planned. ``on_rank`` says whether plans so far leave the slot
    active.

    Most columns are read whole: a step has work for nearly every row, and a mask over all of them
    is cheaper than picking them out.
    """

    def __init__(self, num_data: int, num_slots: int, max_pages: int, num_cohorts: int) -> None:
        total = num_data * num_slots
        self.num_data, self.num_slots, self.num_cohorts = num_data, num_slots, num_cohorts
        self.state = np.zeros(total, np.uint8)
        self.on_rank = np.zeros(total, np.bool_)
        self.held = np.zeros(total, np.bool_)
        self.cohort = (self.slot(np.arange(total)) % num_cohorts).astype(np.uint8)
        self.low = np.zeros(total, np.int64)
        self.high = np.zeros(total, np.int64)
        self.sent = np.zeros(total, np.int64)
        self.finish = np.zeros(total, np.uint8)
        # What a request brings with it, set at once: see ``occupy``. ``allowance`` is how many
        # tokens it may sample at most.
        self._brought = np.zeros((8, total), np.int64)
        (
            self.prompt,
            self.limit,
            self.allowance,
            self.base,
            self.order,
            self.frontend,
            self.handle,
            self.score_bytes,
        ) = self._brought
        self.num_pages = np.zeros(total, np.int64)
        self.pages = np.zeros((total, max_pages), np.int64)
        self.page_sum = np.zeros(total, np.uint64)
        self.requests: list[Request | None] = [None] * total
        self.num_used = [0] * num_data
        # Free slots per data index and cohort, lowest on top.
        self._free = [
            [list(range(cohort, num_slots, num_cohorts))[::-1] for cohort in range(num_cohorts)]
            for _ in range(num_data)
        ]

    def data(self, row: _Rows) -> _Rows:
        """The data index of a row, or of each row."""
        return row // self.num_slots

    def slot(self, row: _Rows) -> _Rows:
        """The slot of a row, or of each row, on its rank."""
        return row % self.num_slots

    def row(self, data: int, slot: int) -> int:
        return data * self.num_slots + slot

    def of_data(self, data: int) -> range:
        """The rows of ``data``."""
        return range(data * self.num_slots, (data + 1) * self.num_slots)

    def sum_by_data(self, values: NDArray[Any]) -> NDArray[Any]:
        """Sums [D] of values [rows]."""
        sums: NDArray[Any] = values.reshape(self.num_data, -1).sum(axis=1)
        return sums

    def request(self, row: int) -> Request:
        request = self.requests[row]
        assert request is not None, f"row {row} has no request"
        return request

    def has_free(self, data: int) -> bool:
        return self.num_used[data] < self.num_slots

    def claim(self, data: int, request: Request) -> None:
        """Gives ``request`` a free row of ``data``, which ``occupy`` fills."""
        slot = max(self._free[data], key=len).pop()
        self.num_used[data] += 1
        request.row = self.row(data, slot)
        self.requests[request.row] = request

    def occupy(
        self, requests: list[Request], sent: list[int], counts: Int64, pages: Int64, local: Int64
    ) -> None:
        """Fills the rows of ``requests`` [n]. The first ``sent`` [n] tokens need not be computed;
        pages are ``counts`` [n] of each request, end to end, as global and as local ids.
        """
        rows = np.array([request.row for request in requests])
        self.state[rows] = State.PRELOADING
        self.held[rows] = False
        self.finish[rows] = 0
        self.sent[rows] = sent
        self._brought[:, rows] = np.array([self._of_request(request) for request in requests]).T
        self.num_pages[rows] = counts
        owners, index = ragged(counts)
        owners = rows[owners]
        self.pages[owners, index] = pages
        terms = page_terms(self.slot(owners), index, local)
        self.page_sum[rows] = np.add.reduceat(terms, np.cumsum(counts) - counts)

    @staticmethod
    def _of_request(request: Request) -> tuple[int, ...]:
        staged, limit = request.num_staged, request.limit
        who = request.order, request.frontend, request.handle
        return staged, limit, limit - staged, request.num_emitted, *who, request.score_bytes

    def append_pages(self, rows: Int64, pages: Int64, local: Int64) -> None:
        """Appends a page to each of rows [n], given as global and as local ids."""
        count = self.num_pages[rows]
        self.pages[rows, count] = pages
        self.num_pages[rows] = count + 1
        self.page_sum[rows] += page_terms(self.slot(rows), count, local)

    def take_pages(self, rows: Int64) -> tuple[Int64, Int64]:
        """Empties the page tables of rows [n]; how many pages each held [n], and which, end to end
        (global ids).
        """
        counts = self.num_pages[rows]
        owners, index = ragged(counts)
        pages = self.pages[rows[owners], index]
        self.num_pages[rows] = 0
        self.page_sum[rows] = 0
        return counts, pages

    def vacate(self, rows: list[int]) -> None:
        """Makes rows free for the next requests."""
        self.state[rows] = State.FREE
        self.finish[rows] = 0
        for row in rows:
            self.request(row).row = -1
            self.requests[row] = None
            data = self.data(row)
            self.num_used[data] -= 1
            self._free[data][self.slot(row) % self.num_cohorts].append(self.slot(row))
