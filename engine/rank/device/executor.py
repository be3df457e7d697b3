"""Executes plans asynchronously: the host enqueues work on the device and reads results later.

The host keeps slots, lengths and pages, which plans determine; tokens stay on the device, where the
next step reads them, and the host reads them when they have arrived. So a step may begin while
others are under way. A row whose logits depend on tokens that the host has to know (a grammar, bad
words) makes the host wait for the steps before; penalties are counted on the device.

Suffixes: T tokens of a step, C rows that draw, B rows of a captured step, S rows that ask for
log-probabilities, D hidden, V vocabulary.
"""

from __future__ import annotations

import functools
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ....kernels.host_arrays import to_device
from ....parallel.collectives import CollectiveError
from ....parallel.device_waits import DeviceWaits
from ...protocol.arrays import Int64
from ...protocol.buckets import most_tokens
from ...protocol.plan import Admit, Header, Section, StepPlan
from ...protocol.results import PromptLogprobs, RowLogprobs, StepResult
from ...protocol.slot_table import Rows
from ..contract import StepAbandoned
from ..executor import NOTHING, Executor, Sampled, row_errors, with_tokens
from ..halves import Part, halves, whole
from ..parts import Parts
from ..span_notes import SpanNotes
from ..token_logprobs import logprob_lines
from .captured import CapturedSteps
from .first_steps import compute_first_steps
from .graphs import GraphRecorder
from .slots import DeviceSlots, Lane, new_pages
from .split_draw import draw_of
from .step_arrays import NUM_LANE_ARRAYS, Arrays, LaneArrays
from .token_counts import token_counts_of
from .transfers import Download, Upload, mark, seconds_between, side_stream
from .under_way import Drawing, UnderWay

_ROW_BYTES, _TOKEN_BYTES, _ENTRY_BYTES, _SPARE_BYTES = 512, 128, 12, 4096
_RESULT_BYTES = 256  # of a row: a token, its log-probability, and those of 20 others
_ENTRIES = 8192
"""Entries of page tables that travel at once."""

_Computed = tuple[Tensor, list[Tensor]]


class DeviceExecutor(Executor):
    """An executor whose steps are under way until ``take`` finds them done. ``max_tokens``: most
    tokens of a step. ``recorder``: captures decode steps; None: none is captured. A step that has
    not ended ``deadline`` seconds after it was handed over has lost a peer. On a GPU, times of
    steps and of waits are the device's.
    """

    counts_tokens = False

    def __init__(
        self,
        parts: Parts,
        num_slots: int,
        max_len: int,
        num_cohorts: int,
        max_tokens: int,
        recorder: GraphRecorder | None,
        deadline: float = math.inf,
    ) -> None:
        super().__init__(parts, num_slots, max_len, num_cohorts)
        self._deadline, self._max_tokens = deadline, max_tokens
        self._guarded = threading.Lock()  # held where another thread asks how far a step is
        num_bytes = _ROW_BYTES * num_slots + _TOKEN_BYTES * max_tokens + _ENTRY_BYTES * _ENTRIES
        self._upload = Upload(num_bytes + _SPARE_BYTES, parts.device)
        result_bytes = _RESULT_BYTES * num_slots + parts.dispatcher.counts_LS.nbytes + _SPARE_BYTES
        self._download = Download(result_bytes, parts.device, side_stream(parts.device))
        self._slots = DeviceSlots(num_slots, self._table.pages.shape[1], parts.pool, parts.device)
        self._counts = token_counts_of(parts, num_slots, max_len)
        self._draw = draw_of(parts, self._settings, self._counts)
        self._captured = CapturedSteps(
            parts, self._slots, self._upload, self._forward, self._draw, max_tokens, recorder
        )
        self._lives = np.zeros(num_slots, np.int64)  # admissions of each slot
        self._under_way: deque[UnderWay] = deque()
        self._waits = DeviceWaits(parts.groups.roles, parts.device, parts.model.ops.add_time)
        if parts.device.type == "cuda":
            parts.groups.time_waits(self._waits)

    # ----------------------------------------------------------------- the contract

    @torch.inference_mode()
    def begin_epoch(self, epoch: int, vacant: tuple[int, ...]) -> None:
        super().begin_epoch(epoch, vacant)
        try:
            self._captured.begin_epoch()
            self._waits.clear()  # of captures, and of a peer that was lost
            self._parts.groups.check()
        except CollectiveError as error:
            raise self._abandoned(error) from error
        finally:
            self._parts.tell("")

    @contextmanager
    def rehearsing(self) -> Iterator[None]:
        """Has computed steps of all sizes, and captured those that can be, without other ranks.
        Their memory is held until the end.
        """
        parts = self._parts
        parts.groups.rehearse()
        try:
            with torch.inference_mode():
                self._waits.clear()
                max_len = self._history.shape[1]
                compute_first_steps(parts, self._slots, self._forward, self._max_tokens, max_len)
                self._captured.begin_epoch()
            yield
        finally:
            self._captured.forget()
            parts.groups.destroy()

    def end_epoch(self) -> None:
        with self._guarded:  # afterwards nobody asks: a capture of the next epoch would fail by it
            dropped = [*self._under_way]
            self._under_way.clear()
        for step in dropped:
            step.fetched.drop()
        super().end_epoch()

    def cut_overdue(self) -> None:
        groups = self._parts.groups
        with self._guarded:
            try:
                oldest = self._under_way[0]
                overdue = oldest.is_overdue(self._deadline) and not oldest.fetched.arrived
            except (IndexError, RuntimeError):  # none, or the device failed: its own thread hears of it
                return
        if overdue and not groups.cut_off:
            groups.cut(oldest.plan.header.epoch, oldest.lateness(self._deadline))

    @torch.inference_mode()
    def submit(self, plan: StepPlan) -> None:
        try:
            self._under_way.append(self._begin_noted(plan) if plan.header.trace else self._begin(plan))
        except CollectiveError as error:
            raise self._abandoned(error) from error

    def take(self) -> StepResult | None:
        if not self._done and self._under_way:
            oldest = self._under_way[0]
            if oldest.fetched.arrived:
                try:
                    self._finish()
                except CollectiveError as error:
                    raise self._abandoned(error) from error
            elif oldest.is_overdue(self._deadline):
                raise self._abandoned(CollectiveError(oldest.lateness(self._deadline)))
        return super().take()

    def _abandoned(self, error: CollectiveError) -> StepAbandoned:
        """Leaves the epoch. A group that was cut off fails in any call: then the reason is that of
        the cut.
        """
        reason = self._parts.groups.cut_off or str(error)
        self.end_epoch()
        return StepAbandoned(reason)

    # ----------------------------------------------------------------- a step begins

    def _begin_noted(self, plan: StepPlan) -> UnderWay:
        parts, dispatcher = self._parts, self._parts.dispatcher
        notes = SpanNotes(dispatcher.clock, parts.turns)
        clock, dispatcher.clock = dispatcher.clock, notes
        try:
            with notes.watching(parts.groups, parts.model.model.layers):
                under_way = self._begin(plan, functools.partial(notes.forward, self._compute))
        finally:
            dispatcher.clock = clock
        return replace(under_way, spans=notes.end(parts.rank, plan.header))

    def _begin(self, plan: StepPlan, compute: Callable[..., _Computed] | None = None) -> UnderWay:
        start, waited, stalled = time.perf_counter(), self._parts.groups.waited, self._parts.links.waited
        header, section, parts = plan.header, plan.section, self._parts
        began = mark(parts.device)
        self._take_expected(header, section)
        self._apply(header, section)
        if self._counts is not None:
            self._counts.send(self._upload)
        rows = self._table.rows(header, section)
        draws = rows.samples & (rows.ends < self._table.limit[rows.slots])
        drawing = self._drawing(rows, draws.nonzero()[0])
        scores: tuple[PromptLogprobs, ...] = ()
        if self._captured.repeats(header, rows):
            fetched, scores = self._repeat(header, rows, draws, drawing, section)
        else:
            hidden_TD, sent = (compute or self._compute)(header, rows, draws, drawing, section)
            fetched = []
            if not parts.links.stage.last:
                self._expect_tokens(header, rows, drawing.chosen)
            else:
                scores = self._score(rows, hidden_TD)
                fetched = self._choose(header.step, hidden_TD, sent, drawing)
        self._table.advance(rows, draws.astype(np.int64))
        if header.counts:
            fetched.append(parts.dispatcher.counts_LS)
        ended = mark(parts.device)  # before the copy, so that it has passed once results are here
        under_way = UnderWay(
            plan=plan,
            outline=self._outline(header, rows, draws, scores),
            drawing=drawing,
            fetched=self._download.fetch([*fetched, self._waits.totals_R]),
            began=began,
            ended=ended,
            since=time.monotonic(),
            handed_over=time.perf_counter() - start,
            waited=parts.groups.waited - waited,
            stalled=parts.links.waited - stalled,
        )
        if header.counts:
            parts.dispatcher.counts_LS.zero_()
        return under_way

    def _admit(self, admit: Admit) -> None:
        self._lives[admit.slot] += 1
        if self._counts is not None:
            self._counts.admit(admit.slot, admit.sampling, self._staged[admit.staged], admit.num_emitted)
        super()._admit(admit)

    def _take_over(self, slots: Int64, positions: Int64, tokens_R: Tensor) -> None:
        self._slots.last_S1.index_copy_(0, to_device(slots, self._parts.device), tokens_R)

    def _drawing(self, rows: Rows, chosen: Int64) -> Drawing:
        """The rows that draw, and their masks, which follow from the tokens of the steps before."""
        slots, grammars = rows.slots[chosen], self._parts.grammars
        if self._settings.follows(slots):
            self._catch_up()
        masks = None if grammars is None else grammars.begin(slots)
        settings = self._settings.rows(slots)
        alone = masks is None and bool(self._settings.unaided(slots).all())
        return Drawing(
            chosen=chosen,
            slots=slots,
            positions=rows.ends[chosen],
            numbers=rows.samples.cumsum()[chosen] - 1,
            lives=self._lives[slots],
            settings=settings,
            alone=alone and self._draw.is_free(settings),
            masks=masks,
        )

    def _compute(
        self, header: Header, rows: Rows, draws: NDArray[np.bool_], drawing: Drawing, section: Section
    ) -> _Computed:
        """Hidden states of the step's tokens [T, D], handed to the next stage if there is one, and
        what was sent for the rows that draw: the index of each one's last token, and its samples.
        """
        parts, num_tokens = self._parts, int(rows.counts.sum())
        capacity = header.capacity
        pair: tuple[Part, ...] = (whole(rows),)
        if header.microbatches > 1:
            capacity = most_tokens(header.capacity)
            pair = halves(rows, capacity, self._forward.kv_share)
        made = [LaneArrays(rows, draws, part, self._history, self._slots.scratch) for part in pair]
        samples = [rows.counts.cumsum()[draws] - 1, *drawing.arrays()]
        arrays = [*self._entries(section), *samples]
        for part, lane in zip(pair, made, strict=True):
            arrays += [part.tokens, *lane.arrays]
        sent = self._upload.send(arrays)
        self._slots.write_pages(sent[0], sent[1])
        samples_sent, rest = sent[2 : 2 + len(samples)], sent[2 + len(samples) :]
        num_pages = max(1, -(-int(rows.ends.max(initial=0)) // parts.pool.page_size))
        self._forward.announce(max(len(part.tokens) for part in pair), capacity)
        width = 1 + NUM_LANE_ARRAYS
        lanes = [rest[at : at + width] for at in range(0, len(rest), width)]
        runs = [
            functools.partial(self._layers, lane.on_device(tensors[1:]), num_pages)
            for lane, tensors in zip(made, lanes, strict=True)
        ]
        if len(runs) == 1:
            return self._forward.relay(header.step, num_tokens, 0, runs[0]), samples_sent
        tokens = [tensors[0] for tensors in lanes]
        return self._forward.relay_both(header.step, tokens, runs), samples_sent

    def _layers(self, lane: Lane, num_pages: int, received_TD: Tensor | None) -> Tensor:
        """Hidden states of a lane, from those of the stage before."""
        tokens_T, positions_T, batch = self._slots.inputs(lane, num_pages)
        inputs = tokens_T if received_TD is None else received_TD
        hidden_TD: Tensor = self._parts.model(inputs, positions_T, batch, self._parts.pool.cache)
        return hidden_TD

    def _repeat(
        self, header: Header, rows: Rows, draws: NDArray[np.bool_], drawing: Drawing, section: Section
    ) -> tuple[list[Tensor], tuple[PromptLogprobs, ...]]:
        """A captured step. Returns what the host will read, and the scores of prompts."""
        size, steps = header.capacity, self._captured
        alone = drawing.alone and steps.samples(size)
        sent = steps.send(size, rows, draws, self._entries(section), drawing.arrays(), alone)
        hidden_BD = steps.layers(size, sent)
        scores = self._score(rows, hidden_BD)
        if alone:
            return [steps.drawn(size, sent)], scores
        return self._choose(header.step, hidden_BD, steps.drawing(sent), drawing), scores

    def _entries(self, section: Section) -> Arrays:
        """The entries of page tables that a step adds, but for those that travel ahead because they
        are many.
        """
        places, pages = new_pages(section, self._table)
        while len(places) > _ENTRIES:
            self._slots.write_pages(*self._upload.send([places[:_ENTRIES], pages[:_ENTRIES]]))
            places, pages = places[_ENTRIES:], pages[_ENTRIES:]
        return [places, pages]

    # ----------------------------------------------------------------- tokens

    def _choose(self, step: int, hidden_TD: Tensor, sent: list[Tensor], drawing: Drawing) -> list[Tensor]:
        """Draws the tokens of a step. ``sent``: the index of the last token of each row, and the
        samples. Returns what the host will read.
        """
        if not len(drawing.slots):
            return []
        hidden_CD = hidden_TD.index_select(0, sent[0])
        tokens_C, more = self._draw.draw(hidden_CD, sent[1:], drawing)
        self._slots.last_S1.index_copy_(0, sent[1], tokens_C)
        if self._counts is not None and self._counts.among(drawing.slots):
            self._counts.add(sent[1], tokens_C)
        self._parts.links.send_tokens(step, tokens_C)
        return [tokens_C, *more]

    # ----------------------------------------------------------------- a step ends

    def _catch_up(self) -> None:
        """Waits for the tokens of all steps under way."""
        while self._under_way:
            self._finish()

    def _finish(self) -> None:
        """Ends the oldest step under way, once its tokens are here. Raises CollectiveError where
        they mean nothing.
        """
        step = self._under_way[0]  # where ``cut_overdue`` sees it
        *arrays, totals_R = step.fetched.wait()
        self._under_way.popleft()
        drawing, header = step.drawing, step.plan.header
        self._parts.groups.check()
        sampled = NOTHING
        if self._parts.links.stage.last and len(drawing.slots):
            sampled = self._sampled(drawing, arrays)
        blocks = self._parts.pool.blocks
        blocks.publish(step.plan.section)
        for later in self._under_way:  # begun since: what they write is no longer what it was
            blocks.overwrite(later.plan.section)
        waits, links = self._waits.since(totals_R), self._parts.links
        result = with_tokens(
            step.outline,
            sampled,
            expert_i64=arrays[-1].tobytes() if header.counts else b"",
            waited=step.waited + sum(waits.values()),
            seconds=seconds_between(step.began, step.ended, step.handed_over),
            stalled=step.stalled + sum(waits[role] for role in {*links.roles}),
        )
        self._done.append((result, step.spans))

    def _sampled(self, drawing: Drawing, arrays: list[NDArray[Any]]) -> Sampled:
        """Takes in tokens that have arrived. Slots that were given away since take none."""
        tokens: Int64 = arrays[0]
        mine = self._lives[drawing.slots] == drawing.lives
        slots, positions = drawing.slots[mine], drawing.positions[mine]
        self._history[slots, positions] = tokens[mine]
        if not self._parts.samples:
            return NOTHING
        self._settings.observe(slots, tokens[mine])
        errors: dict[int, str] = {}
        if drawing.masks is not None and self._parts.grammars is not None:
            errors = self._parts.grammars.observe(slots, tokens[mine])
        settings = drawing.settings
        lines: tuple[RowLogprobs, ...] = ()
        if len(settings.asked):
            top = torch.from_numpy(arrays[1]), torch.from_numpy(arrays[2]), torch.from_numpy(arrays[3])
            lines = logprob_lines(top, drawing.numbers[settings.asked], settings.num_logprobs[settings.asked])
        ended = (settings.stop == tokens[:, None]).any(1)
        return Sampled(
            tokens, drawing.numbers[ended], lines, row_errors(errors, drawing.slots, drawing.numbers)
        )
