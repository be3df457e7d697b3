"""The planner's rows: sequence slots of all data indices, row = data x num_slots + slot."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..protocol.arrays import Int64, ragged
from ..protocol.checksum import page_terms
from .request import Request, State

_Rows = TypeVar("_Rows", int, Int64)


class RowTable:
    """The state of every row, a column per fact. Lengths count tokens whose KV is computed.

    After all plans sent, the length of a decoding row lies in [``low``, ``high``], cut at ``limit``
    - 1: a plan moves both on, a result brings them together. ``sent`` is the number of prompt
    tokens planned for a row in prefill. ``on_rank`` says whether plans so far leave the slot
    active.

    Most code reads whole columns: nearly every row works in each step, so a mask over all rows is
    cheaper than selecting some.
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
        self.unwritten = np.zeros(total, np.int64)  # tokens up to ``low``, see ``set_back``
        self.sent = np.zeros(total, np.int64)
        self.finish = np.zeros(total, np.uint8)
        # Columns that ``occupy`` copies from a request. ``allowance`` is the most tokens it may
        # sample.
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
        self._touched: dict[int, None] = {}  # rows whose ``held`` changed since it was sent

    # ----------------------------------------------------------------- rows and data indices

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

    # ----------------------------------------------------------------- questions

    def request(self, row: int) -> Request:
        request = self.requests[row]
        assert request is not None, f"row {row} has no request"
        return request

    def num_free(self, data: int) -> int:
        return self.num_slots - self.num_used[data]

    def decoding(self, cohort: int) -> NDArray[np.bool_]:
        """Whether each row decodes in a step of ``cohort`` [rows]."""
        chosen: NDArray[np.bool_] = self.state == State.DECODE
        chosen &= ~self.held
        if self.num_cohorts > 1:
            chosen &= self.cohort == cohort
        return chosen

    def named_on(self, data: int) -> list[int]:
        """Rows of ``data`` that some plan has named and that are not free yet."""
        mine = self.of_data(data)
        named = (self.state[mine.start : mine.stop] >= State.PREFILL).nonzero()[0] + mine.start
        rows: list[int] = named.tolist()
        return rows

    # ----------------------------------------------------------------- a request comes and goes

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
        self.unwritten[rows] = 0
        self.sent[rows] = sent
        self._brought[:, rows] = np.array([self._brought_by(request) for request in requests]).T
        self.num_pages[rows] = counts
        owners, index = ragged(counts)
        owners = rows[owners]
        self.pages[owners, index] = pages
        terms = page_terms(self.slot(owners), index, local)
        self.page_sum[rows] = np.add.reduceat(terms, np.cumsum(counts) - counts)

    def ready(self, row: int) -> None:
        """Marks a row READY: every member of its data index has its prompt."""
        self.state[row] = State.READY

    def retire(self, row: int) -> None:
        """Marks a row DRAINING: no further plan names it."""
        self.state[row] = State.DRAINING

    def end(self, row: int, finish: int) -> None:
        """Ends the request of the row with reason ``finish``; later tokens do not count."""
        self.finish[row] = finish

    def vacate(self, rows: list[int]) -> None:
        """Makes rows free for the next requests."""
        self.state[rows] = State.FREE
        self.finish[rows] = 0
        for row in rows:
            self.request(row).row = -1
            self.requests[row] = None
            data = self.data(row)
            slot = self.slot(row)
            self.num_used[data] -= 1
            self._free[data][slot % self.num_cohorts].append(slot)

    # ----------------------------------------------------------------- plans and results

    def admit(self, rows: Int64) -> None:
        """Marks rows [n] as placed in their slots by a plan."""
        self.on_rank[rows] = True

    def clear(self, rows: Int64) -> None:
        """Marks the slots of rows [n] as freed by a plan."""
        self.on_rank[rows] = False

    def extend(self, rows: Int64, ends: Int64) -> NDArray[np.bool_]:
        """Advances the prompts of rows [n] up to ``ends`` [n]. Returns whether each prompt ends
        there: its row samples, and decodes from then on.
        """
        last: NDArray[np.bool_] = ends == self.prompt[rows]
        self.sent[rows] = ends
        self.state[rows] = np.where(last, State.DECODE, State.PREFILL)
        self.low[rows[last]] = self.high[rows[last]] = ends[last]
        return last

    def decode(self, decoding: Int64, max_advance: int) -> None:
        """Lets the rows ``decoding`` [rows], 0 or 1, grow by 1 to ``max_advance`` tokens."""
        self.low += decoding
        self.high += decoding * max_advance if max_advance > 1 else decoding

    def narrow(self, rows: Int64, grown: Int64, max_advance: int) -> None:
        """Narrows lengths: rows [n] have grown by ``grown`` [n]; their plan allowed 1 to
        ``max_advance``.
        """
        self.low[rows] += grown - 1
        self.high[rows] += grown - max_advance

    def set_back(self, data: int, unreported: Int64, unwritten: Int64) -> None:
        """Clears ``data``; plans that let its rows decode ``unreported`` [rows] times are void.
        Some of its ranks may lack the KV of the last ``unwritten`` [rows] tokens that count.
        """
        mine = slice(self.of_data(data).start, self.of_data(data).stop)
        self.low[mine] -= unreported[mine]
        self.unwritten[mine] = unwritten[mine]
        self.on_rank[mine] = False

    # ----------------------------------------------------------------- holds

    def hold(self, row: int, *, held: bool) -> None:
        """Pauses or resumes a row."""
        self.held[row] = held
        self._touched[row] = None

    def take_holds(self) -> dict[int, tuple[list[int], list[int]]]:
        """Slots to hold and to resume since the last call, per data index. A row that is not on its
        rank yet waits for a later call; one that has left is dropped.
        """
        changed: dict[int, tuple[list[int], list[int]]] = {}
        touched, self._touched = self._touched, {}
        for row in touched:
            if self.on_rank[row] and self.state[row] in (State.PREFILL, State.DECODE):
                hold, resume = changed.setdefault(self.data(row), ([], []))
                (hold if self.held[row] else resume).append(self.slot(row))
            elif self.state[row] in (State.PRELOADING, State.READY):
                self._touched[row] = None
        return changed

    # ----------------------------------------------------------------- pages

    def append_pages(self, rows: Int64, pages: Int64, local: Int64) -> None:
        """Appends a page to each of rows [n], given as global and as local ids."""
        count = self.num_pages[rows]
        self.pages[rows, count] = pages
        self.num_pages[rows] = count + 1
        self.page_sum[rows] += page_terms(self.slot(rows), count, local)

    def take_pages(self, rows: Int64) -> tuple[Int64, Int64]:
        """Empties the page tables of rows [n]. Returns what ``read_pages`` does."""
        counts, pages = self.read_pages(rows)
        self.num_pages[rows] = 0
        self.page_sum[rows] = 0
        return counts, pages

    def read_pages(self, rows: Int64) -> tuple[Int64, Int64]:
        """The number of pages of each of rows [n], and those pages end to end (global ids)."""
        counts = self.num_pages[rows]
        owners, index = ragged(counts)
        return counts, self.pages[rows[owners], index]

    @staticmethod
    def _brought_by(request: Request) -> tuple[int, ...]:
        """The columns of ``_brought``."""
        staged, limit = request.num_staged, request.limit
        who = request.order, request.frontend, request.handle
        return staged, limit, limit - staged, request.num_emitted, *who, request.score_bytes
