"""Builds the next plan of a group and commits the group to it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..protocol.arrays import Int64
from ..protocol.plan import Header, Mode
from .flight import Check, Flight
from .group import Group
from .group_plan import GroupPlan
from .growth import Growth
from .packing import add_up
from .prefill import DecodeLoad, Prefill, PromptChunks
from .sections import Sections

_REPORT_EVERY = 64
"""Steps between two reports of expert loads and phases."""


class StepBuilder:
    """Turns the state of a group into its next plan."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._growth = Growth(group)
        self._prefill = Prefill(group)
        self._sections = Sections(group)
        self._next_cohort = 0

    def build(self) -> GroupPlan | None:
        """The next plan, or None when no cohort has work. Cohorts take turns."""
        num_cohorts = self._group.mesh.num_cohorts
        for turn in range(num_cohorts):
            cohort = (self._next_cohort + turn) % num_cohorts
            plan = self._build_cohort(cohort)
            if plan is not None:
                self._next_cohort = (cohort + 1) % num_cohorts
                return plan
        return None

    def _build_cohort(self, cohort: int) -> GroupPlan | None:
        """Builds a plan for one cohort: grows decoding rows, advances prompts as far as the step
        has room, and builds the sections.
        """
        group, rows = self._group, self._group.rows
        decoding = rows.decoding(cohort)
        if not decoding.any() and not group.prefilling.has_work(cohort):
            return None
        decoding, grown = self._growth.grow(cohort, decoding)
        changes = self._sections.take_changes(grown)
        growing = decoding.astype(np.int64)  # sums and products would convert bools every time
        load = DecodeLoad(rows.sum_by_data(growing), rows.sum_by_data(rows.low * growing))
        chunks = self._prefill.advance(cohort, load)
        tokens = load.rows if chunks is None else load.rows + self._add_up(chunks.data, chunks.counts)
        sections = self._sections.build(changes, chunks, tokens)
        capacity = max((section.bucket for section in sections.values()), default=0)
        rows.decode(growing, group.spec.max_advance)
        flight = self._freeze(decoding, load, chunks, tokens)
        flight.capacity, flight.microbatches = capacity, group.overlap.microbatches(capacity)
        flight.unheard = len(sections) * group.mesh.world // group.mesh.data
        self._retire_at_limit(flight, decoding, chunks)
        border = flight.step % _REPORT_EVERY == 0
        first = group.steps.predecessor == -1
        moves, commits = group.moves.plan(border=border, first=first)
        header = Header(
            group=group.index,
            epoch=group.steps.epoch,
            step=flight.step,
            predecessor=group.steps.predecessor,
            mode=Mode.DECODE if chunks is None else Mode.MIXED,
            capacity=capacity,
            microbatches=flight.microbatches,
            cohort=cohort,
            checksum=flight.check is not None,
            counts=flight.step % _REPORT_EVERY == _REPORT_EVERY - 1,
            moves=moves,
            commits=commits,
            vacant=group.steps.vacant,
        )
        group.steps.sent(flight)
        group.counters.steps += 1
        return GroupPlan(header, sections)

    def _freeze(
        self, decoding: NDArray[np.bool_], load: DecodeLoad, chunks: PromptChunks | None, tokens: Int64
    ) -> Flight:
        """Freezes the list of rows that sample in the step."""
        group = self._group
        sampling = decoding.nonzero()[0]
        decode = np.ones(len(sampling), np.bool_)
        ends = load.rows.cumsum()
        context = np.zeros(group.mesh.data, np.int64)
        extended = sampling[:0]
        if chunks is not None:
            extended = chunks.rows
            sampled = ends[chunks.sampled_data] + np.arange(len(chunks.sampled))
            decode = np.ones(len(sampling) + len(sampled), np.bool_)
            decode[sampled] = False
            both = np.empty(len(decode), np.int64)
            both[decode], both[sampled] = sampling, chunks.sampled
            sampling = both
            ends = ends + np.bincount(chunks.sampled_data, minlength=group.mesh.data).cumsum()
            context = self._add_up(chunks.data, chunks.counts * chunks.starts)
        step = group.steps.next_step
        check = self._check() if step % group.spec.checksum_every == 0 else None
        return Flight(step, sampling, decode, [0, *ends.tolist()], tokens, load.kv, context, extended, check)

    def _retire_at_limit(
        self, flight: Flight, decoding: NDArray[np.bool_], chunks: PromptChunks | None
    ) -> None:
        """Retires rows that sample their last token in this step."""
        group, rows = self._group, self._group.rows
        last = ((rows.low >= rows.limit - 1) & decoding).nonzero()[0].tolist()
        if chunks is not None:
            sampled = chunks.sampled
            last += sampled[rows.low[sampled] >= rows.limit[sampled] - 1].tolist()
        for row in last:
            group.draining.retire(row, flight.step)

    def _check(self) -> Check:
        """The state that ranks should have after this plan."""
        rows = self._group.rows
        active = np.flatnonzero(rows.on_rank)
        sent = np.where(rows.sent[active] < rows.prompt[active], rows.sent[active], -1)
        sums = rows.sum_by_data(np.where(rows.on_rank, rows.page_sum, np.uint64(0)))
        return Check(active, sent, sums)

    def _add_up(self, data: Int64, values: Int64) -> Int64:
        return add_up(data, values, self._group.mesh.data)
