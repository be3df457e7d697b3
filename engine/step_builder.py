"""Builds the next plan of a group: which rows decode, which prompts advance, which pages they get."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from .group import Check, Flight, Group
from .requests import Request, State
from .slots import Int64
from .types import Admit, Header, Mode, Section

_BUCKETS = np.array([0, 1, 2, 4, *range(8, 64, 8), *range(64, 256, 32), *range(256, 1024, 128), *range(1024, 1 << 20, 1024)])


@dataclass(frozen=True)
class Plan:
    """A step for the whole group: the shared header and the section of every living data index."""

    header: Header
    sections: dict[int, Section]


@dataclass
class _Draft:
    """The parts of one section while it is being filled."""

    admit: list[Admit] = field(default_factory=list)
    extend: list[tuple[int, int]] = field(default_factory=list)
    sampled: list[int] = field(default_factory=list)
    tokens: int = 0
    context: int = 0


_NOTHING = _Draft()
_DECODE = int(State.DECODE)  # looked up in every step; a member of an enumeration is slow to find


@dataclass(frozen=True)
class _Changes:
    """What a plan does to running rows: slots to (hold, resume), freed slots, and (slot, page) of the rows that grow."""

    held: dict[int, tuple[list[int], list[int]]]
    freed: dict[int, bytes]
    pages: dict[int, bytes]


def bucket_of(num_tokens: Int64) -> Int64:
    """The smallest bucket that holds each number of tokens."""
    return _BUCKETS[_BUCKETS.searchsorted(num_tokens)]


def _i32(values: Sequence[int] | Int64) -> bytes:
    return np.asarray(values, np.int32).tobytes()


class StepBuilder:
    """Turns the state of a group into its next plan, and records what that plan commits the group to."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._bounds = np.arange(group.num_data + 1) * group.rows.num_slots

    def build(self) -> Plan | None:
        """The next plan, or None when no cohort has work."""
        for turn in range(self._group.num_cohorts):
            cohort = (self._group.next_cohort + turn) % self._group.num_cohorts
            plan = self._build_cohort(cohort)
            if plan is not None:
                self._group.next_cohort = (cohort + 1) % self._group.num_cohorts
                return plan
        return None

    def _build_cohort(self, cohort: int) -> Plan | None:
        group = self._group
        decode = self._decoding(cohort)
        if not len(decode) and not self._has_prefill(cohort):
            return None
        decode, pages = self._grow(cohort, decode)
        held = self._changed_holds()
        freed = {data: self._freed(data) for data in list(group.freeing)}
        offsets = decode.searchsorted(self._bounds)
        num_decode, kv = offsets[1:] - offsets[:-1], self._kv(decode, offsets)
        drafts = self._prefill(cohort, num_decode, kv)
        sections = self._sections(_Changes(held, freed, pages), drafts, num_decode)
        flight = self._fly(decode, offsets, drafts, kv)
        header = Header(
            group=0,
            epoch=group.epoch,
            step=group.next_step,
            predecessor=-1 if group.restarting else group.next_step - 1,
            mode=Mode.MIXED if drafts else Mode.DECODE,
            capacity=max((section.bucket for section in sections.values()), default=0),
            cohort=cohort,
            checksum=flight.check is not None,
            counts=group.next_step % 64 == 63,
        )
        group.restarting = False
        group.next_step += 1
        return Plan(header, sections)

    # ----------------------------------------------------------------- rows

    def _decoding(self, cohort: int) -> Int64:
        """Rows that decode in this step, ascending."""
        rows = self._group.rows
        chosen = rows.state == _DECODE
        chosen &= ~rows.held
        if self._group.num_cohorts > 1:
            chosen &= rows.cohort == cohort
        found: Int64 = chosen.nonzero()[0]
        return found

    def _kv(self, decode: Int64, offsets: Int64) -> Int64:
        """KV tokens [D] that decoding rows read at least."""
        rows = self._group.rows
        sums = np.zeros(len(decode) + 1, np.int64)
        (rows.low[decode] + rows.flying[decode]).cumsum(out=sums[1:])
        sums = sums[offsets]
        kv: Int64 = sums[1:] - sums[:-1]
        return kv

    def _has_prefill(self, cohort: int) -> bool:
        rows = self._group.rows
        return any(rows.cohort[row] == cohort and not rows.held[row] for queue in self._group.prefilling for row in queue)

    def _changed_holds(self) -> dict[int, tuple[list[int], list[int]]]:
        """Slots to hold and to resume per data index; a row that is not on its rank yet is named later, one that has left never."""
        group, rows = self._group, self._group.rows
        changed: dict[int, tuple[list[int], list[int]]] = {}
        touched, group.holding = group.holding, {}
        for row in touched:
            if rows.on_rank[row] and rows.state[row] in (State.PREFILL, State.DECODE):
                changed.setdefault(rows.data(row), ([], []))[0 if rows.held[row] else 1].append(rows.slot(row))
            elif rows.state[row] in (State.STAGING, State.READY):
                group.holding[row] = None
        return changed

    # ----------------------------------------------------------------- pages

    def _grow(self, cohort: int, decode: Int64) -> tuple[Int64, dict[int, bytes]]:
        """Pages for the longest every decoding row may become; takes them from others where a pool is exhausted.

        Returns the rows that still decode, and (slot, page) of those that grow per data index. A row that may be at its limit already
        still computes a position, hence ``limit``.
        """
        group, rows = self._group, self._group.rows
        while True:
            longest = np.minimum(rows.low[decode] + (rows.flying[decode] + 1) * group.spec.max_advance, rows.limit[decode])
            growing = decode[longest > rows.num_pages[decode] * group.page_size]
            if not len(growing):  # most steps
                return decode, {}
            data = growing // rows.num_slots
            short = group.kv.short_of(np.bincount(data, minlength=group.num_data))
            if not short.size:
                break
            for index in short.tolist():
                self._give_way(index)
            decode = self._decoding(cohort)
        pages = group.kv.take_each(data)
        rows.append_pages(growing, pages, group.kv.max_pages)
        pairs = np.stack([growing % rows.num_slots, pages - data * group.kv.max_pages], axis=1).astype(np.int32)
        cuts = growing.searchsorted(self._bounds).tolist()
        return decode, {index: pairs[start:end].tobytes() for index, (start, end) in enumerate(pairwise(cuts)) if end > start}

    def _give_way(self, data: int) -> None:
        """Frees pages of ``data``: those of rows on their way out, or else the youngest request's, which will run again."""
        group, rows = self._group, self._group.rows
        mine = np.arange(data * rows.num_slots, (data + 1) * rows.num_slots)
        leaving = mine[(rows.state[mine] == State.DRAINING) & (rows.num_pages[mine] > 0)]
        if leaving.size:
            for row in leaving.tolist():
                group.give_back_pages(row)
            return
        mine = mine[(rows.state[mine] >= State.STAGING) & (rows.state[mine] <= State.DECODE)]
        assert len(mine) > 1, f"data {data}: a single request does not fit the pool"
        self._preempt(int(mine[np.argmax(rows.order[mine])]))

    def _preempt(self, row: int) -> None:
        group, rows = self._group, self._group.rows
        group.counters.preemptions += 1
        if rows.state[row] in (State.STAGING, State.READY):
            group.queue.put_back(group.unreserve(row))
            return
        prefilling = group.prefilling[rows.data(row)]
        if row in prefilling:
            prefilling.remove(row)
        group.retire(row, group.next_step - 1)
        group.give_back_pages(row)

    # ----------------------------------------------------------------- prompts

    def _prefill(self, cohort: int, num_decode: Int64, kv: Int64) -> dict[int, _Draft]:
        """Gives every data index its share of prompt tokens; rows that reach the end of their prompt start to decode."""
        group = self._group
        drafts: dict[int, _Draft] = {}
        anyone_decodes = bool(num_decode.any())
        for data, waiting in enumerate(group.prefilling):
            if not waiting:
                continue
            queue = [row for row in waiting if group.rows.cohort[row] == cohort and not group.rows.held[row]]
            if not queue:
                continue
            draft = _Draft()
            budget = group.spec.max_batch_tokens - int(num_decode[data])
            if anyone_decodes:
                context = int(group.rows.sent[queue[0]])
                fits = group.cost.prefill_tokens_within(group.spec.inter_token_target, int(num_decode[data]), float(kv[data]), context)
                budget = min(budget, max(fits, group.page_size))
            for row in queue:
                if budget <= 0:
                    break
                budget -= self._extend(draft, data, row, budget)
            drafts[data] = draft
        return drafts

    def _extend(self, draft: _Draft, data: int, row: int, budget: int) -> int:
        """Plans the next chunk of one prompt, at most ``budget`` tokens; returns its length."""
        group, rows = self._group, self._group.rows
        sent, prompt = int(rows.sent[row]), int(rows.prompt[row])
        count = min(prompt - sent, budget)
        if rows.state[row] == State.READY:
            draft.admit.append(self._admit(data, row, sent))
        draft.extend.append((rows.slot(row), count))
        draft.tokens += count
        draft.context += count * sent
        self._mark_written(data, row, sent, sent + count)
        rows.sent[row] = sent + count
        rows.state[row] = State.PREFILL
        if sent + count == prompt:
            group.prefilling[data].remove(row)
            rows.state[row] = State.DECODE
            rows.low[row], rows.flying[row] = prompt, 0
            draft.sampled.append(row)
        return count

    def _admit(self, data: int, row: int, num_cached: int) -> Admit:
        group, rows = self._group, self._group.rows
        request: Request = rows.request(row)
        group.by_staged.pop(request.staged)
        rows.on_rank[row] = True
        local = rows.pages[row, : rows.num_pages[row]] - data * group.kv.max_pages
        return Admit(
            slot=rows.slot(row),
            staged=request.staged,
            num_cached=num_cached,
            num_emitted=request.num_emitted,
            limit=request.limit,
            pages_i32=_i32(local),
            sampling=request.sampling,
        )

    def _mark_written(self, data: int, row: int, start: int, end: int) -> None:
        """The blocks that [start, end) completes can be read by later plans on the same rank."""
        group = self._group
        first, last = start // group.page_size, end // group.page_size
        if last > first:
            pages = group.rows.pages[row, first:last]
            group.kv.written[pages] = group.next_step
            hashes = group.rows.request(row).hashes[first:last]
            pages = pages[: len(hashes)]
            if len(pages):
                group.publishing.append((np.full(len(pages), data), hashes, pages.copy()))

    # ----------------------------------------------------------------- sections

    def _sections(self, changes: _Changes, drafts: dict[int, _Draft], num_decode: Int64) -> dict[int, Section]:
        group = self._group
        published = self._published()
        tokens = num_decode.copy()
        for data, draft in drafts.items():
            tokens[data] += draft.tokens
        buckets = bucket_of(tokens).tolist()
        sections: dict[int, Section] = {}
        for data in group.alive.nonzero()[0].tolist():
            draft, publish, own_pages = drafts.get(data, _NOTHING), published.get(data), changes.pages.get(data, b"")
            if draft is _NOTHING and publish is None and not (data in changes.freed or data in changes.held or group.rebasing[data]):
                sections[data] = Section(pages_pairs=own_pages, bucket=buckets[data])
                continue
            hold, resume = changes.held.get(data, ([], []))
            sections[data] = Section(
                rebase=bool(group.rebasing[data]),
                staged_from=group.staged_from[data] if group.rebasing[data] else 0,
                free_i32=changes.freed.get(data, b""),
                hold_i32=_i32(hold),
                resume_i32=_i32(resume),
                admit=tuple(draft.admit),
                pages_pairs=own_pages,
                publish_i32=publish[0] if publish else b"",
                publish_h128=publish[1] if publish else b"",
                extend_pairs=np.array(draft.extend, np.int32).tobytes(),
                bucket=buckets[data],
            )
        self._finish_rebase()
        return sections

    def _freed(self, data: int) -> bytes:
        """Slots this plan frees; after a rebase the rank has none to free."""
        group = self._group
        freed = group.freeing.pop(data)
        group.rows.on_rank[freed] = False
        return b"" if group.rebasing[data] else _i32([group.rows.slot(row) for row in freed])

    def _published(self) -> dict[int, tuple[bytes, bytes]]:
        """(pages, hashes) per data index of the blocks written since the last plan that are still what they were."""
        group = self._group
        if not group.publishing:
            return {}
        data = np.concatenate([data for data, _, _ in group.publishing])
        keys = np.concatenate([keys for _, keys, _ in group.publishing])
        pages = np.concatenate([pages for _, _, pages in group.publishing])
        group.publishing.clear()
        valid = group.kv.index.names(data, keys, pages)
        data, keys, pages = data[valid], keys[valid], pages[valid]
        order = np.argsort(data, kind="stable")
        data, keys, pages = data[order], keys[order], pages[order] - data[order] * group.kv.max_pages
        cuts = np.searchsorted(data, np.arange(group.num_data + 1)).tolist()
        local = pages.astype(np.int32)
        return {
            index: (local[start:end].tobytes(), keys[start:end].tobytes())
            for index, (start, end) in enumerate(pairwise(cuts))
            if end > start
        }

    def _finish_rebase(self) -> None:
        """Results of plans before a rebase say nothing about the rank's state after it."""
        group = self._group
        if not group.rebasing.any():
            return
        for data in np.flatnonzero(group.rebasing & group.alive).tolist():
            group.acknowledged[group.members(data)] = group.next_step - 1
        group.rebasing[group.alive] = False

    # ----------------------------------------------------------------- commitments

    def _fly(self, decode: Int64, offsets: Int64, drafts: dict[int, _Draft], kv: Int64) -> Flight:
        """Records the plan as in flight: frozen rows, bounds on lengths, rows that end by their length limit."""
        group, rows = self._group, self._group.rows
        step = group.next_step
        rows.flying[decode] += 1
        sampled = [row for draft in drafts.values() for row in draft.sampled]
        final = decode[rows.low[decode] + rows.flying[decode] >= rows.limit[decode] - 1]
        last = [*final.tolist(), *(row for row in sampled if rows.prompt[row] >= rows.limit[row] - 1)]
        order, is_decode = decode, np.ones(len(decode), np.bool_)
        tokens, context = offsets[1:] - offsets[:-1], np.zeros(group.num_data, np.int64)
        if drafts:
            for data, draft in drafts.items():
                tokens[data] += draft.tokens
                context[data] = draft.context
            at = np.repeat(offsets[1:], [len(drafts[d].sampled) if d in drafts else 0 for d in range(group.num_data)])
            order = np.insert(decode, at, sampled)
            is_decode = np.insert(is_decode, at, False)
            offsets = np.searchsorted(order // rows.num_slots, np.arange(group.num_data + 1))
        flight = Flight(step, order, is_decode, offsets.tolist(), tokens, kv, context)
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
        exact = np.where(rows.flying[active] == 0, rows.low[active], -1)
        lengths = np.where(rows.sent[active] < rows.prompt[active], rows.sent[active], exact)
        sums = np.where(rows.on_rank, rows.page_sum, np.uint64(0)).reshape(rows.num_data, -1).sum(axis=1, dtype=np.uint64)
        return Check(active, lengths, sums)
