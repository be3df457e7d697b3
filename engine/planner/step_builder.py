"""Builds the next plan of a group: which rows decode, which prompts advance, which pages they
get.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..protocol.arrays import Int64, as_keys, ragged
from ..protocol.message import HASH_BYTES
from ..protocol.plan import Admit, Header, Mode, Section
from .flight import Check, Flight
from .group import Group
from .group_plan import Plan
from .request import State

_SCORE_BYTES = 12 << 10
"""Log-probabilities of prompts that the result of a step may hold. The step socket carries at most 16 kB per rank and step."""

_BUCKETS = np.array(
    [0, 1, 2, 4, *range(8, 64, 8), *range(64, 256, 32), *range(256, 1024, 128), *range(1024, 1 << 20, 1024)]
)


@dataclass
class _Prompts:
    """The prompt chunks of one step, data-major and in the order of each queue.

    data, rows, starts, counts [n]: whose they are, where in its prompt each begins, and its tokens.
    sampled [k], sampled_data [k]: rows whose prompt ends here, so that they sample. admits: of the
    rows that come with their first chunk, per data index.
    """

    data: Int64
    rows: Int64
    starts: Int64
    counts: Int64
    sampled: Int64
    sampled_data: Int64
    admits: dict[int, list[Admit]]


_Packed = dict[int, bytes]
"""Parts of sections as they are sent, for those data indices that have any."""


@dataclass(frozen=True)
class _Changes:
    """What a plan does to running rows: slots to (hold, resume), freed slots, and (slot, page) of
    the rows that grow.
    """

    held: dict[int, tuple[list[int], list[int]]]
    freed: _Packed
    pages: _Packed


def bucket_of(num_tokens: Int64) -> Int64:
    """The smallest bucket that holds each number of tokens."""
    return _BUCKETS[_BUCKETS.searchsorted(num_tokens)]


def _i32(values: Sequence[int]) -> bytes:
    return np.array(values, np.int32).tobytes()


def _pairs(first: Int64, second: Int64) -> NDArray[np.int32]:
    """Columns [n] as int32 [n, 2]."""
    return np.stack([first, second], axis=1).astype(np.int32)


class StepBuilder:
    """Turns the state of a group into its next plan, and records what that plan commits the group
    to.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        self._data = np.arange(group.num_data + 1)

    def build(self) -> Plan | None:
        """The next plan, or None when no cohort has work."""
        for turn in range(self._group.mesh.num_cohorts):
            cohort = (self._group.next_cohort + turn) % self._group.mesh.num_cohorts
            plan = self._build_cohort(cohort)
            if plan is not None:
                self._group.next_cohort = (cohort + 1) % self._group.mesh.num_cohorts
                return plan
        return None

    def _build_cohort(self, cohort: int) -> Plan | None:
        group = self._group
        decoding = self._decoding(cohort)
        if not decoding.any() and not self._has_prefill(cohort):
            return None
        decoding, pages = self._grow(cohort, decoding)
        changes = _Changes(self._changed_holds(), self._freed(), pages)
        num_decode, kv = group.rows.sum_by_data(decoding), group.rows.sum_by_data(group.rows.low * decoding)
        prompts = self._prefill(cohort, num_decode, kv)
        tokens = num_decode if prompts is None else num_decode + self._add_up(prompts.data, prompts.counts)
        sections = self._sections(changes, prompts, tokens)
        flight = self._fly(decoding, num_decode, prompts, tokens, kv)
        header = Header(
            group=0,
            epoch=group.epoch,
            step=group.next_step,
            predecessor=-1 if group.restarting else group.next_step - 1,
            mode=Mode.DECODE if prompts is None else Mode.MIXED,
            capacity=max((section.bucket for section in sections.values()), default=0),
            cohort=cohort,
            checksum=flight.check is not None,
            counts=group.next_step % 64 == 63,
        )
        group.restarting = False
        group.next_step += 1
        return Plan(header, sections)

    # ----------------------------------------------------------------- per data index

    def _add_up(self, data: Int64, values: Int64) -> Int64:
        """Sums [D] of values [n] that belong to data [n]."""
        return np.bincount(data, values, minlength=self._group.num_data).astype(np.int64)

    def _pack(self, data: Int64, values: NDArray[Any]) -> _Packed:
        """The bytes of values [n, ...] that belong to data [n], which ascends."""
        packed, size = values.tobytes(), values.itemsize * math.prod(values.shape[1:])
        cuts = (data.searchsorted(self._data) * size).tolist()
        return {index: packed[start:end] for index, (start, end) in enumerate(pairwise(cuts)) if end > start}

    # ----------------------------------------------------------------- rows

    def _decoding(self, cohort: int) -> NDArray[np.bool_]:
        """Which rows decode in this step [rows]."""
        rows = self._group.rows
        chosen: NDArray[np.bool_] = rows.state == State.DECODE
        chosen &= ~rows.held
        if self._group.mesh.num_cohorts > 1:
            chosen &= rows.cohort == cohort
        return chosen

    def _has_prefill(self, cohort: int) -> bool:
        rows = self._group.rows
        return any(
            rows.cohort[row] == cohort and not rows.held[row]
            for queue in self._group.prefilling
            for row in queue
        )

    def _changed_holds(self) -> dict[int, tuple[list[int], list[int]]]:
        """Slots to hold and to resume per data index; a row that is not on its rank yet is named
        later, one that has left never.
        """
        group, rows = self._group, self._group.rows
        changed: dict[int, tuple[list[int], list[int]]] = {}
        touched, group.holding = group.holding, {}
        for row in touched:
            if rows.on_rank[row] and rows.state[row] in (State.PREFILL, State.DECODE):
                changed.setdefault(rows.data(row), ([], []))[0 if rows.held[row] else 1].append(
                    rows.slot(row)
                )
            elif rows.state[row] in (State.PRELOADING, State.READY):
                group.holding[row] = None
        return changed

    # ----------------------------------------------------------------- pages

    def _grow(self, cohort: int, decoding: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], _Packed]:
        """Pages for the longest every decoding row may become; takes them from others where a pool
        is exhausted.

        Returns which rows still decode, and (slot, page) of those that grow. A row that may be at
        its limit already still computes a position, hence ``limit``.
        """
        group, rows = self._group, self._group.rows
        while True:
            longest = np.minimum(rows.high + group.spec.max_advance, rows.limit)
            growing = ((longest > rows.num_pages * group.page_size) & decoding).nonzero()[0]
            if not len(growing):
                return decoding, {}
            data = rows.data(growing)
            short = group.kv.short_of(np.bincount(data, minlength=group.num_data))
            if not short.size:
                break
            for index in short.tolist():
                self._give_way(index)
            decoding = self._decoding(cohort)
        pages = group.kv.take_each(data)
        local = group.kv.local(pages)
        rows.append_pages(growing, pages, local)
        return decoding, self._pack(data, _pairs(rows.slot(growing), local))

    def _give_way(self, data: int) -> None:
        """Frees pages of ``data``: those of rows on their way out, or else the youngest request's,
        which will run again.
        """
        group, rows = self._group, self._group.rows
        mine = np.array(rows.of_data(data))
        leaving = mine[(rows.state[mine] == State.DRAINING) & (rows.num_pages[mine] > 0)]
        if leaving.size:
            for row in leaving.tolist():
                group.give_back_pages(row)
            return
        mine = mine[(rows.state[mine] >= State.PRELOADING) & (rows.state[mine] <= State.DECODE)]
        assert len(mine) > 1, f"data {data}: a single request does not fit the pool"
        self._preempt(int(mine[np.argmax(rows.order[mine])]))

    def _preempt(self, row: int) -> None:
        group, rows = self._group, self._group.rows
        group.counters.preemptions += 1
        if rows.state[row] in (State.PRELOADING, State.READY):
            group.queue.put_back(group.unreserve(row))
            return
        prefilling = group.prefilling[rows.data(row)]
        if row in prefilling:
            prefilling.remove(row)
        group.retire(row, group.next_step - 1)
        group.give_back_pages(row)

    # ----------------------------------------------------------------- prompts

    def _prefill(self, cohort: int, num_decode: Int64, kv: Int64) -> _Prompts | None:
        """Gives every data index its share of prompt tokens; rows that reach the end of their
        prompt start to decode.

        None when no prompt waits; one that waits where the rows that decode leave no token for it
        has no chunk.
        """
        group, rows = self._group, self._group.rows
        chunks: list[tuple[int, int, int, int]] = []  # data, row, start, count
        anyone_decodes, anyone_waits = bool(num_decode.any()), False
        for data, queue in enumerate(group.prefilling):
            waiting = [row for row in queue if rows.cohort[row] == cohort and not rows.held[row]]
            if not waiting:
                continue
            anyone_waits = True
            budget = group.spec.max_batch_tokens - int(num_decode[data])
            if anyone_decodes:
                context = int(rows.sent[waiting[0]])
                fits = group.cost.prefill_tokens_within(
                    group.spec.inter_token_target, int(num_decode[data]), float(kv[data]), context
                )
                budget = min(budget, max(fits, group.page_size))
            chunks += [(data, *chunk) for chunk in self._share(waiting, budget)]
        return self._advance(np.array(chunks, np.int64).reshape(-1, 4)) if anyone_waits else None

    def _share(self, waiting: list[int], budget: int) -> Iterator[tuple[int, int, int]]:
        """Chunks (row, start, count) of the first prompts that wait, ``budget`` tokens together.
        Rows that report log-probabilities of their prompts advance as far as one result has room
        for that.
        """
        rows, room = self._group.rows, _SCORE_BYTES
        for row in waiting:
            if budget <= 0:
                return
            start, each = int(rows.sent[row]), int(rows.score_bytes[row])
            count = min(int(rows.prompt[row]) - start, budget, room // each if each else budget)
            if count:
                yield row, start, count
                budget -= count
                room -= count * each

    def _advance(self, chunks: Int64) -> _Prompts:
        """Moves rows past their chunks [n, (data, row, start, count)]."""
        group, rows = self._group, self._group.rows
        data, row, start, count = chunks.T
        end = start + count
        new, last = rows.state[row] == State.READY, end == rows.prompt[row]
        admits = self._admit(data[new], row[new])
        self._mark_written(data, row, start, end)
        rows.sent[row] = end
        rows.state[row] = np.where(last, State.DECODE, State.PREFILL)
        sampled, sampled_data = row[last], data[last]
        rows.low[sampled] = rows.high[sampled] = end[last]
        for index, owner in zip(sampled.tolist(), sampled_data.tolist(), strict=True):
            group.prefilling[owner].remove(index)
        return _Prompts(data, row, start, count, sampled, sampled_data, admits)

    def _admit(self, data: Int64, row: Int64) -> dict[int, list[Admit]]:
        """Admits rows [n] of data [n]."""
        group, rows = self._group, self._group.rows
        admits: dict[int, list[Admit]] = {}
        rows.on_rank[row] = True
        for owner, index, cached in zip(data.tolist(), row.tolist(), rows.sent[row].tolist(), strict=True):
            request = rows.request(index)
            group.by_staged.pop(request.staged)
            pages = group.kv.local(rows.pages[index, : rows.num_pages[index]])
            admit = Admit(
                slot=rows.slot(index),
                staged=request.staged,
                num_cached=cached,
                num_emitted=request.num_emitted,
                limit=request.limit,
                pages_i32=pages.astype(np.int32).tobytes(),
                sampling=request.sampling,
            )
            admits.setdefault(owner, []).append(admit)
        return admits

    def _mark_written(self, data: Int64, row: Int64, start: Int64, end: Int64) -> None:
        """The blocks that chunks [start, end) [n] complete can be read by later plans on the same
        rank.
        """
        group, rows = self._group, self._group.rows
        first, behind = start // group.page_size, end // group.page_size
        owners, index = ragged(behind - first)
        pages = rows.pages[row[owners], first[owners] + index]
        group.kv.written[pages] = group.next_step
        hashes = [rows.request(own).hashes_h128 for own in row.tolist()]
        spans = zip(hashes, first.tolist(), behind.tolist(), strict=True)
        keys = as_keys(b"".join([own[HASH_BYTES * begin : HASH_BYTES * stop] for own, begin, stop in spans]))
        hashed = (
            index + first[owners] < np.array([len(own) // HASH_BYTES for own in hashes], np.int64)[owners]
        )
        group.publishing.append((data[owners[hashed]], keys, pages[hashed]))

    # ----------------------------------------------------------------- sections

    def _sections(self, changes: _Changes, prompts: _Prompts | None, tokens: Int64) -> dict[int, Section]:
        group = self._group
        pages, hashes = self._published()
        admits: dict[int, list[Admit]] = {}
        extends: _Packed = {}
        if prompts is not None:
            admits, extends = (
                prompts.admits,
                self._pack(prompts.data, _pairs(group.rows.slot(prompts.rows), prompts.counts)),
            )
        rebasing = np.flatnonzero(group.rebasing).tolist()
        changed = {*pages, *extends, *changes.freed, *changes.held, *rebasing}  # the others only grow
        buckets = bucket_of(tokens).tolist()
        sections: dict[int, Section] = {}
        for data in group.alive.nonzero()[0].tolist():
            if data not in changed:
                sections[data] = Section(pages_pairs=changes.pages.get(data, b""), bucket=buckets[data])
                continue
            hold, resume = changes.held.get(data, ((), ()))
            rebase = data in rebasing
            sections[data] = Section(
                rebase=rebase,
                staged_from=group.staged_from[data] if rebase else 0,
                free_i32=b""
                if rebase
                else changes.freed.get(data, b""),  # after a rebase the rank has none to free
                hold_i32=_i32(hold) if hold else b"",
                resume_i32=_i32(resume) if resume else b"",
                admit=tuple(admits.get(data, ())),
                pages_pairs=changes.pages.get(data, b""),
                publish_i32=pages.get(data, b""),
                publish_h128=hashes.get(data, b""),
                extend_pairs=extends.get(data, b""),
                bucket=buckets[data],
            )
        self._finish_rebase()
        return sections

    def _freed(self) -> _Packed:
        """Slots this plan frees."""
        group, rows = self._group, self._group.rows
        if not group.freeing:
            return {}
        freed = np.array(group.freeing)
        group.freeing.clear()
        rows.on_rank[freed] = False
        data = rows.data(freed)
        order = data.argsort(kind="stable")
        return self._pack(data[order], rows.slot(freed)[order].astype(np.int32))

    def _published(self) -> tuple[_Packed, _Packed]:
        """Pages, and their hashes, of the blocks written since the last plan that are still what
        they were.
        """
        group = self._group
        if not group.publishing:
            return {}, {}
        data, keys, pages = (np.concatenate(parts) for parts in zip(*group.publishing, strict=True))
        group.publishing.clear()
        valid = group.kv.index.names(data, keys, pages).nonzero()[0]
        valid = valid[data[valid].argsort(kind="stable")]
        data, keys, pages = data[valid], keys[valid], pages[valid]
        return self._pack(data, group.kv.local(pages).astype(np.int32)), self._pack(data, keys)

    def _finish_rebase(self) -> None:
        """Results of plans before a rebase say nothing about the rank's state after it."""
        group = self._group
        for data in np.flatnonzero(group.rebasing & group.alive).tolist():
            group.assume_executed(data)
        group.rebasing[group.alive] = False

    # ----------------------------------------------------------------- commitments

    def _fly(
        self,
        decoding: NDArray[np.bool_],
        num_decode: Int64,
        prompts: _Prompts | None,
        tokens: Int64,
        kv: Int64,
    ) -> Flight:
        """Records the plan as in flight: frozen rows, bounds on lengths, rows that end by their
        length limit.
        """
        group, rows = self._group, self._group.rows
        step = group.next_step
        rows.low += decoding
        rows.high += decoding * group.spec.max_advance
        frozen = decoding.nonzero()[0]
        last = ((rows.low >= rows.limit - 1) & decoding).nonzero()[0].tolist()
        decode, ends, context = (
            np.ones(len(frozen), np.bool_),
            num_decode.cumsum(),
            np.zeros(group.num_data, np.int64),
        )
        extended = frozen[:0]
        if prompts is not None:
            extended = prompts.rows
            at, sampled = ends[prompts.sampled_data], prompts.sampled
            frozen, decode = np.insert(frozen, at, sampled), np.insert(decode, at, False)
            ends = ends + np.bincount(prompts.sampled_data, minlength=group.num_data).cumsum()
            context = self._add_up(prompts.data, prompts.counts * prompts.starts)
            last += sampled[rows.prompt[sampled] >= rows.limit[sampled] - 1].tolist()
        flight = Flight(step, frozen, decode, [0, *ends.tolist()], tokens, kv, context, extended)
        if step % group.spec.checksum_every == 0:
            flight.check = self._check()
        group.flights[step] = flight
        for row in last:
            group.retire(row, step)
        group.counters.steps += 1
        return flight

    def _check(self) -> Check:
        rows = self._group.rows
        active = np.flatnonzero(rows.on_rank)
        sent = np.where(rows.sent[active] < rows.prompt[active], rows.sent[active], -1)
        sums = rows.sum_by_data(np.where(rows.on_rank, rows.page_sum, np.uint64(0)))
        return Check(active, sent, sums)
