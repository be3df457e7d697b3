"""Executes plans on one rank: sequence slots, page pool, model and sampler.

Suffixes: T tokens of a step, R rows that sample, D hidden, V vocabulary.
"""

from __future__ import annotations

import functools
import os
import secrets
import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from msgspec import structs
from numpy.typing import NDArray
from torch import Tensor

from ...moe.experts import slot_form
from ...parallel.collectives import CollectiveError, Pending
from ..models.decoder import Model
from ..protocol.arrays import Int32, Int64
from ..protocol.bulk import RankHello
from ..protocol.plan import Admit, Header, Section, StepPlan
from ..protocol.results import PromptLogprobs, RowError, RowLogprobs, StepResult
from ..protocol.slot_table import Rows, SlotTable
from ..protocol.timeline import StepSpans
from .contract import StepAbandoned
from .forward import Forward
from .masks import Masks
from .parts import Parts
from .prompt_logprobs import Chunk, score
from .slot_sampling import SlotSettings
from .span_notes import SpanNotes
from .token_choice import TokenChoice


@dataclass(frozen=True)
class Sampled:
    """Tokens of the rows that were drawn, in row order. ``ended`` and the log-probabilities name a
    row by its index among the rows that sample.
    """

    tokens: Int64
    ended: Int64
    logprobs: tuple[RowLogprobs, ...] = ()
    errors: tuple[RowError, ...] = ()


@dataclass(frozen=True)
class _Expected:
    """Tokens of ``slots`` [R] at ``positions`` [R] that the last stage samples for ``cohort``."""

    cohort: int
    slots: Int64
    positions: Int64
    pending: Pending


NOTHING = Sampled(np.zeros(0, np.int64), np.zeros(0, np.int64))


def with_tokens(result: StepResult, sampled: Sampled, **more: Any) -> StepResult:
    """The result with the tokens of its step, and ``more`` of its fields."""
    return structs.replace(
        result,
        tokens_i32=sampled.tokens.astype(np.int32).tobytes(),
        ended_i32=sampled.ended.astype(np.int32).tobytes(),
        logprobs=sampled.logprobs,
        errors=sampled.errors,
        **more,
    )


class Executor:
    """Holds a rank's state and executes plans on it."""

    counts_tokens: ClassVar[bool] = True  # on the host, for penalties

    def __init__(self, parts: Parts, num_slots: int, max_len: int, num_cohorts: int) -> None:
        self._parts = parts
        self._table = SlotTable(num_slots, -(-max_len // parts.pool.page_size), num_cohorts)
        self._settings = SlotSettings(num_slots, parts.model.config.vocab_size, self.counts_tokens)
        self._history = np.zeros((num_slots, max_len), np.int32)  # tokens by position: prompt, then output
        self._forward = Forward(parts, self._table, self._history)
        self._choice = TokenChoice(parts, self._settings)
        self._staged: dict[int, Int32] = {}
        self._constrained: set[int] = set()  # staged prompts with a grammar
        self._expected: list[_Expected] = []
        self._done: deque[tuple[StepResult, StepSpans | None]] = deque()
        self._spans: StepSpans | None = None
        self._life = secrets.randbits(62)

    @property
    def model(self) -> Model:
        return self._parts.model

    @property
    def samples(self) -> bool:
        """Whether results of this rank hold tokens."""
        return self._parts.samples

    def hello(self) -> RankHello:
        pool, placement = self._parts.pool, self._parts.dispatcher.placement
        experts = self.model.experts()
        return RankHello(
            rank=self._parts.rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            num_pages=pool.num_pages,
            page_size=pool.page_size,
            page_bytes=pool.page_bytes,
            num_layers=placement.num_layers,
            num_expert_slots=placement.num_slots,
            device=str(self._parts.device),
            num_experts=placement.num_experts,
            expert_bytes=self._parts.expert_bytes,
            life=self._life,
            recovery=self._parts.groups.recovery,
            placement_version=0 if self._parts.slots is None else self._parts.slots.version,
            placement_i32=b"" if self._parts.slots is None else self._parts.slots.placement_i32,
            expert_form=slot_form(experts[0]) if experts else "",
        )

    def published(self) -> tuple[bytes, bytes]:
        return self._parts.pool.blocks.all()

    def begin_epoch(self, epoch: int, vacant: tuple[int, ...]) -> None:
        self._done.clear()
        self.end_epoch()
        try:
            self._parts.groups.build(epoch, vacant)
        except CollectiveError as error:
            raise StepAbandoned(str(error)) from error

    def end_epoch(self) -> None:
        """Leaves the groups and drops what travels in them: gloo keeps connections of held messages
        open, and peers wait on.
        """
        self._expected.clear()
        self._parts.links.forget()
        self._parts.groups.destroy()

    def cut(self, epoch: int) -> None:
        """Ends what the device waits for in ``epoch`` or before. Any thread may call."""
        self._parts.groups.cut(epoch)

    def cut_overdue(self) -> None:
        """As ``cut``, where a device has had a step too long; waits of a host end by themselves."""

    def place(self, version: int, placement_i32: bytes) -> None:
        assert self._parts.slots is not None, "another placement, where experts stay"
        self._parts.slots.place(version, placement_i32)

    def stage(self, staged: int, tokens_i32: bytes, grammar: str = "", num_emitted: int = 0) -> bool:
        tokens = self._staged[staged] = np.frombuffer(tokens_i32, np.int32)
        if grammar:
            self._constrained.add(staged)
        if not grammar or not self._parts.samples:
            return True
        assert self._parts.grammars is not None, "a grammar for a rank without vocabulary"
        self._parts.grammars.stage(staged, grammar, tokens[len(tokens) - num_emitted :])
        return False

    def unstage(self, staged: int) -> None:
        self._staged.pop(staged, None)
        self._constrained.discard(staged)
        if self._parts.grammars is not None:
            self._parts.grammars.unstage(staged)

    @property
    def phases_entered(self) -> int:
        return self._parts.dispatcher.clock.entered

    @property
    def compiling(self) -> bool:
        return self._parts.grammars is not None and self._parts.grammars.compiling

    def take_compiled(self) -> list[tuple[int, str]]:
        return [] if self._parts.grammars is None else self._parts.grammars.take_compiled()

    def close(self) -> None:
        if self._parts.grammars is not None:
            self._parts.grammars.close()
        self._parts.groups.close()

    def submit(self, plan: StepPlan) -> None:
        """Applies a plan and computes its step, even without rows: other ranks wait in the exchange
        of every layer.

        After StepAbandoned the state is undefined until the rebase that opens the next epoch.
        """
        try:
            noted = self._execute_noted(plan) if plan.header.trace else (self._execute(plan), None)
        except CollectiveError as error:
            self.end_epoch()
            raise StepAbandoned(str(error)) from error
        self._done.append(noted)

    def take(self) -> StepResult | None:
        if not self._done:
            return None
        result, self._spans = self._done.popleft()
        return result

    def take_spans(self) -> StepSpans | None:
        spans, self._spans = self._spans, None
        return spans

    def _execute_noted(self, plan: StepPlan) -> tuple[StepResult, StepSpans]:
        parts, dispatcher = self._parts, self._parts.dispatcher
        notes = SpanNotes(dispatcher.clock, parts.turns)
        clock, dispatcher.clock = dispatcher.clock, notes
        try:
            with notes.watching(parts.groups, parts.model.model.layers):
                result = self._execute(plan, functools.partial(notes.forward, self._forward.run))
        finally:
            dispatcher.clock = clock
        return result, notes.end(parts.rank, plan.header)

    @torch.inference_mode()
    def _execute(self, plan: StepPlan, forward: Callable[..., Tensor] | None = None) -> StepResult:
        start, waited = time.perf_counter(), self._parts.groups.waited
        stalled = self._parts.links.waited
        header, section = plan.header, plan.section
        self._take_expected(header, section)
        self._apply(header, section)
        rows = self._table.rows(header, section)
        # With drafts a row can reach its limit early.
        draws = rows.samples & (rows.ends < self._table.limit[rows.slots])
        masks = self._parts.grammars.begin(rows.slots[draws]) if self._parts.grammars is not None else None
        hidden_TD = (forward or self._forward.run)(header, rows, draws)
        chosen = draws.nonzero()[0]
        scores: tuple[PromptLogprobs, ...] = ()
        sampled = NOTHING
        if self._parts.links.stage.last:
            scores = self._score(rows, hidden_TD)
            if len(chosen):
                sampled = self._sample(header.step, rows, chosen, hidden_TD, masks)
        else:
            self._expect_tokens(header, rows, chosen)
        self._table.advance(rows, draws.astype(np.int64))
        self._parts.pool.blocks.publish(section)
        return with_tokens(
            self._outline(header, rows, draws, scores),
            sampled,
            expert_i64=self._expert_counts() if header.counts else b"",
            waited=self._parts.groups.waited - waited,
            seconds=time.perf_counter() - start,
            stalled=self._parts.links.waited - stalled,
        )

    def _outline(
        self, header: Header, rows: Rows, draws: NDArray[np.bool_], scores: tuple[PromptLogprobs, ...]
    ) -> StepResult:
        """The result of a step whose plan has been applied, without its tokens, expert loads and
        times.
        """
        missing = draws.sum() < rows.samples.sum()
        return StepResult(
            group=header.group,
            epoch=header.epoch,
            step=header.step,
            rank=self._parts.rank,
            counts_u8=draws[rows.samples].astype(np.uint8).tobytes() if missing else b"",
            checksum=self._table.checksum() if header.checksum else 0,
            phases_f32=np.array(self._parts.dispatcher.clock.take(), np.float32).tobytes()
            if header.counts
            else b"",
            prompt_logprobs=scores if self._parts.samples else (),
            landed_i32=b"" if self._parts.slots is None else self._parts.slots.landed(),
            transports=self._parts.groups.transports if header.predecessor < 0 else "",
        )

    # ----------------------------------------------------------------- state

    def _apply(self, header: Header, section: Section) -> None:
        assert not section.copies, "no page copies yet"
        self._move_experts(header)
        if section.rebase:
            self._staged = {
                staged: tokens for staged, tokens in self._staged.items() if staged >= section.staged_from
            }
            self._constrained.intersection_update(self._staged)
            if self._parts.grammars is not None:
                self._parts.grammars.rebase(section.staged_from)
        lengths = {admit.staged: len(self._staged[admit.staged]) for admit in section.admit}
        for admit in self._table.apply(section, lengths):
            self._admit(admit)
        self._parts.pool.blocks.overwrite(section)

    def _move_experts(self, header: Header) -> None:
        slots = self._parts.slots
        if slots is None:
            return
        if header.predecessor < 0:
            slots.begin_epoch(header.commits)
        if header.commits:
            slots.commit(header.commits)
        if header.predecessor < 0:
            slots.leave_out(header.vacant)
        for moves in header.moves:
            slots.start(moves)

    def _admit(self, admit: Admit) -> None:
        tokens = self._staged.pop(admit.staged)
        self._history[admit.slot, : len(tokens)] = tokens
        grammar = admit.staged in self._constrained
        self._constrained.discard(admit.staged)
        self._settings.admit(admit.slot, admit.sampling, tokens, admit.num_emitted, grammar)
        if self._parts.grammars is not None:
            self._parts.grammars.admit(
                admit.slot, admit.staged, np.frombuffer(admit.sampling.stop_i32, np.int32)
            )

    def _expert_counts(self) -> bytes:
        counts_LS = self._parts.dispatcher.counts_LS
        counts = counts_LS.cpu().numpy().tobytes()
        counts_LS.zero_()
        return counts

    # ----------------------------------------------------------------- the step

    def _expect_tokens(self, header: Header, rows: Rows, chosen: Int64) -> None:
        """The first stage will get the tokens of a step that was handed on."""
        links = self._parts.links
        if links.stage.first and len(chosen):
            pending = links.expect_tokens(header.step, len(chosen))
            self._expected.append(_Expected(header.cohort, rows.slots[chosen], rows.ends[chosen], pending))

    def _take_expected(self, header: Header, section: Section) -> None:
        """Takes in the tokens that earlier steps of this cohort sampled on the last stage. A rebase
        needs none of them.
        """
        if section.rebase:
            self._expected.clear()
        expected, self._expected = self._expected, []
        for item in expected:
            if item.cohort == header.cohort:
                self._take_over(item.slots, item.positions, self._parts.links.take_tokens(item.pending))
            else:
                self._expected.append(item)

    def _take_over(self, slots: Int64, positions: Int64, tokens_R: Tensor) -> None:
        """Takes in tokens that the last stage sampled."""
        self._history[slots, positions] = tokens_R.cpu().numpy()

    def _score(self, rows: Rows, hidden_TD: Tensor) -> tuple[PromptLogprobs, ...]:
        """Log-probabilities of the prompt tokens that follow each position of this step's chunks,
        for requests that asked.
        """
        settings, slots = self._settings, rows.slots[rows.num_decode :]
        found: list[PromptLogprobs] = []
        for number in np.flatnonzero(settings.num_prompt_logprobs[slots] >= 0).tolist():
            row, slot = rows.num_decode + number, slots[number]
            start = int(rows.starts[row])
            end = min(int(rows.ends[row]) + 1, int(settings.first_output[slot]))
            if end > start + 1:
                first = int(rows.counts[:row].sum())
                asked = int(settings.num_prompt_logprobs[slot]), bool(settings.prompt_ranks[slot])
                chunk = Chunk(number, start + 1, first, self._history[slot, start + 1 : end], *asked)
                found.append(score(self._parts, hidden_TD, chunk))
        return tuple(found)

    def _sample(
        self, step: int, rows: Rows, chosen: Int64, hidden_TD: Tensor, masks: Masks | None
    ) -> Sampled:
        """Samples a token for each of the rows ``chosen`` [R], or takes over what another rank of
        the tensor group samples.
        """
        slots, positions = rows.slots[chosen], rows.ends[chosen]
        if len(chosen) < len(hidden_TD):
            last = rows.counts.cumsum()[chosen] - 1
            hidden_TD = hidden_TD[torch.from_numpy(last).to(hidden_TD.device)]
        numbers = rows.samples.cumsum()[chosen] - 1
        tokens, lines = self._choice.choose(hidden_TD, slots, positions, numbers, masks)
        self._parts.links.send_tokens(step, torch.from_numpy(tokens).to(self._parts.device))
        self._history[slots, positions] = tokens
        if not self._parts.samples:
            return NOTHING
        settings = self._settings.rows(slots)
        self._settings.observe(slots, tokens)
        errors: dict[int, str] = {}
        if masks is not None and self._parts.grammars is not None:
            errors = self._parts.grammars.observe(slots, tokens)
        ended = (settings.stop == tokens[:, None]).any(1)
        return Sampled(tokens, numbers[ended], lines, row_errors(errors, slots, numbers))


def row_errors(errors: dict[int, str], slots: Int64, numbers: Int64) -> tuple[RowError, ...]:
    """The errors of ``slots`` [R], which sample as rows ``numbers`` [R]."""
    if not errors:
        return ()
    rows = dict(zip(slots.tolist(), numbers.tolist(), strict=True))
    return tuple(RowError(rows[slot], reason) for slot, reason in errors.items())
