"""The timeline of some steps, for a frontend that asks: marks their plans, keeps their times, and
hands on the spans of ranks.

Off the planning path unless somebody asks; one timeline at a time.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from msgspec import structs

from ...parallel.mesh import Mesh
from ..planner.group_plan import GroupPlan
from ..protocol.message import Message
from ..protocol.plan import Header
from ..protocol.results import StepResult
from ..protocol.timeline import (
    MOST_SECONDS,
    MOST_SPANS,
    MOST_STEPS,
    AskTimeline,
    StepSpans,
    TimelineEnd,
    clock_name,
)

_PATIENCE = 5.0
"""Seconds after the time asked in which ranks may finish the steps that were planned."""


@dataclass
class _Step:
    """A plan that was marked. ``answered`` [world] are the times at which results were read."""

    facts: tuple[int, int, int, int, int]
    times: tuple[float, float]
    answered: list[float]


@dataclass
class _Open:
    """The timeline under way, asked for by ``frontend``, of steps of ``epoch``. ``left`` plans are
    still to be marked until ``planned_by``; ``missing`` spans of ranks are owed.
    """

    frontend: bytes
    ask: AskTimeline
    epoch: int
    planned_by: float
    left: int
    missing: int = 0
    num_spans: int = 0
    num_dropped: int = 0
    steps: dict[int, _Step] = field(default_factory=dict)


class StepTimeline:
    """Times are seconds of ``time.perf_counter``. ``send`` sends to a frontend by its name."""

    def __init__(self, mesh: Mesh, send: Callable[[bytes, Message], None]) -> None:
        self._mesh, self._send = mesh, send
        self._taken: _Open | None = None

    @property
    def is_open(self) -> bool:
        """Whether a timeline is being taken."""
        return self._taken is not None

    def ask(self, frontend: bytes, message: AskTimeline, epoch: int, now: float) -> None:
        """Begins with the next plan, unless another timeline is being taken."""
        if self._taken is not None:
            busy = "Another timeline is being taken: ask again when it has ended"
            self._send(frontend, TimelineEnd(message.id, busy, 409))
            return
        seconds = min(message.seconds, MOST_SECONDS)
        steps = min(message.steps, MOST_STEPS)
        self._taken = _Open(frontend, message, epoch, now + seconds, steps)

    def mark(self, plan: GroupPlan, now: float) -> GroupPlan:
        """The plan as it is sent: with the mark that asks ranks for their spans."""
        taken = self._taken
        if taken is None or not taken.left or now > taken.planned_by or plan.header.epoch != taken.epoch:
            return plan
        return GroupPlan(structs.replace(plan.header, trace=True), plan.sections)

    def sent(self, header: Header, num_sections: int, num_tokens: int, times: tuple[float, float]) -> None:
        """A marked plan has left: its turn began at the first of ``times``, it was sent at the
        second. All members of its sections will answer.
        """
        taken = self._taken
        assert taken is not None
        facts = header.epoch, header.step, header.microbatches, header.capacity, num_tokens
        taken.steps[header.step] = _Step(facts, times, [math.nan] * self._mesh.world)
        taken.left -= 1
        taken.missing += num_sections * self._mesh.world // self._mesh.data

    def answered(self, results: Iterable[StepResult], now: float) -> None:
        """Results were read."""
        taken = self._taken
        assert taken is not None
        for result in results:
            if (step := taken.steps.get(result.step)) is not None and result.epoch == taken.epoch:
                step.answered[result.rank] = now

    def take(self, spans: StepSpans) -> None:
        """Hands on the spans of a rank, up to ``MOST_SPANS`` in all."""
        taken = self._taken
        if taken is None or spans.epoch != taken.epoch or spans.step not in taken.steps:
            return
        taken.missing -= 1
        if taken.num_spans + spans.num_spans > MOST_SPANS:
            taken.num_dropped += spans.num_spans
            taken.left = 0
        else:
            taken.num_spans += spans.num_spans
            self._send(taken.frontend, spans)

    def look(self, epoch: int, reason: str, now: float) -> None:
        """Ends the timeline where nothing more is to come. ``reason``: why the cluster does not
        serve as it should, if it does not.
        """
        taken = self._taken
        if taken is None:
            return
        done, asked = len(taken.steps), taken.ask.steps
        complete = not taken.missing and not taken.left
        if epoch != taken.epoch:
            why = f"epoch {epoch} began after {done} of {asked} steps" + (f": {reason}" if reason else "")
        elif complete and taken.num_dropped:
            why = f"{done} of {asked} steps have all {MOST_SPANS:,} spans that a timeline may have"
        elif complete:
            why = "" if done == asked else f"a timeline has {done} steps at most, not {asked}"
        elif now > taken.planned_by and not taken.missing:
            why = f"{done} of {asked} steps were planned within {taken.ask.seconds:g} s"
        elif now > taken.planned_by + _PATIENCE:
            why = f"spans of {taken.missing} steps of ranks did not come within {_PATIENCE:g} s"
        else:
            return
        self._end(taken, why)

    def _end(self, taken: _Open, reason: str) -> None:
        self._taken = None
        steps = taken.steps.values()
        end = TimelineEnd(
            id=taken.ask.id,
            reason=reason,
            mesh=self._mesh,
            clock=clock_name(),
            steps_i64=array("q", [number for step in steps for number in step.facts]).tobytes(),
            times_f64=array("d", [time for step in steps for time in step.times]).tobytes(),
            answered_f64=array("d", [time for step in steps for time in step.answered]).tobytes(),
            num_dropped=taken.num_dropped,
        )
        self._send(taken.frontend, end)
