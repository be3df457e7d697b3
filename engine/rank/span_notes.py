"""Notes of one step's spans, for its timeline: when attention, exchanges, experts and waits begin
and end, by microbatch. Steps that nobody asks about make none.

Times are the host's. On a GPU they show when work was handed to the device.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import greenlet
from torch import nn

from ...moe.clock import PhaseClock
from ...moe.phases import COMBINE, DISPATCH, EXPERT
from ...parallel.microbatches import Turns
from ...parallel.rank_groups import RankGroups
from ..protocol.plan import Header
from ..protocol.timeline import Span, StepSpans, Track, clock_name

MOST_PER_STEP = 8192
"""Spans that are noted in a step."""

_SHORTEST = 2e-6  # seconds between two notes that are no span: the host's own way there
_PHASES = {DISPATCH: Span.DISPATCH, EXPERT: Span.EXPERTS, COMBINE: Span.COMBINE}
_PHASE_WAITS = {DISPATCH: Span.DISPATCH_WAIT, COMBINE: Span.COMBINE_WAIT}
_ROLE_WAITS = {
    "layers": Span.TENSOR_WAIT,
    "dense": Span.TENSOR_WAIT,
    "stages": Span.STAGE_WAIT,
    "tokens": Span.STAGE_WAIT,
}


@dataclass
class _Lane:
    """A microbatch: its layer, the phase and the times of its last note. ``free``: since when it
    computes something that no span has yet; None while it computes nothing. ``waits`` are the spans
    of waits in the lap under way. ``resumes``: the turn was given away in the middle of a
    computation, which goes on after the wait.
    """

    track: Track
    layer: int = -1
    phase: int = -1
    began: float = 0.0
    free: float | None = None
    entered: bool = False
    resumes: bool = False
    waits: list[int] = field(default_factory=list)


class SpanNotes:
    """Takes the notes of one step. It stands in for the dispatcher's clock, and hears of turns,
    waits and layers, while ``watching``.
    """

    def __init__(self, clock: PhaseClock, turns: Turns, now: Callable[[], float] = time.perf_counter) -> None:
        self._clock, self._turns, self._now = clock, turns, now
        self._step = _Lane(Track.STEP)
        self._lanes = _Lane(Track.FIRST), _Lane(Track.SECOND)
        self._in_forward = False
        self._begun = now()
        self._kinds: list[tuple[int, int, int]] = []
        self._times = array("d")
        self._num_dropped = 0

    # ----------------------------------------------------------------- the step

    @contextmanager
    def watching(self, groups: RankGroups, layers: nn.ModuleDict) -> Iterator[None]:
        """Hears of waits in ``groups`` and of the decoder layers ``layers``, by their numbers."""
        hooks = []
        for number, layer in layers.items():
            hooks.append(layer.register_forward_pre_hook(self._enter(int(number))))
            attention = layer.get_submodule("self_attn")
            hooks.append(attention.register_forward_pre_hook(self._attend))
            hooks.append(attention.register_forward_hook(self._attended))
        before = greenlet.settrace(self._switched)
        groups.listen(self._waited)
        try:
            yield
        finally:
            groups.listen(None)
            greenlet.settrace(before)
            for hook in hooks:
                hook.remove()

    def forward(self, compute: Callable[..., Any], header: Header, *arguments: Any) -> Any:
        """Calls the forward pass."""
        begun = self._now()
        self._add(self._step, Span.APPLY, self._begun, begun)
        self._in_forward = header.microbatches == 1
        if self._in_forward:
            self._lanes[0].free = begun
        computed = compute(header, *arguments)
        self._step.began = self._now()
        self._close(self._lanes[0], self._step.began, Span.OTHER)
        self._in_forward = False
        self._add(self._step, Span.FORWARD, begun, self._step.began)
        return computed

    def end(self, rank: int, header: Header) -> StepSpans:
        """The notes, once the step has its result."""
        ended = self._now()
        self._add(self._step, Span.SAMPLE, self._step.began, ended)
        return StepSpans(
            rank=rank,
            epoch=header.epoch,
            step=header.step,
            begun=self._begun,
            ended=ended,
            clock=clock_name(),
            kinds_i32=array("i", [number for kind in self._kinds for number in kind]).tobytes(),
            times_f64=self._times.tobytes(),
            num_dropped=self._num_dropped,
        )

    # ----------------------------------------------------------------- a clock

    @property
    def entered(self) -> int:
        return self._clock.entered

    def begin_step(self) -> None:
        self._clock.begin_step()

    def mark(self) -> None:
        self._clock.mark()
        lane = self._lane()
        now = self._now()
        self._close(lane, now, Span.GATE)
        lane.began = now

    def lap(self, phase: int) -> None:
        self._clock.lap(phase)
        lane = self._lane()
        now = self._now()
        self._add(lane, _PHASES[phase], lane.began, now)
        for wait in lane.waits:
            self._kinds[wait] = _PHASE_WAITS.get(phase, Span.WAIT), *self._kinds[wait][1:]
        lane.waits.clear()
        outputs_left = phase == COMBINE and lane.phase == EXPERT  # nothing is computed until they are back
        lane.free = None if outputs_left else now
        lane.phase, lane.began = phase, now

    def take(self) -> list[float]:
        return self._clock.take()

    # ----------------------------------------------------------------- what is heard

    def _enter(self, number: int) -> Callable[..., None]:
        def enter(*_: Any) -> None:
            lane = self._lane()
            self._close(lane, self._now(), Span.OTHER)
            lane.layer, lane.phase, lane.free = number, -1, self._now()

        return enter

    def _attend(self, *_: Any) -> None:
        lane = self._lane()
        lane.began = self._now()
        self._close(lane, lane.began, Span.OTHER)

    def _attended(self, *_: Any) -> None:
        lane = self._lane()
        lane.free = self._now()
        self._add(lane, Span.ATTENTION, lane.began, lane.free)

    def _waited(self, role: str, begin: float, end: float) -> None:
        """A wait for another stage is no part of what a microbatch computes."""
        lane = self._lane()
        kind = _ROLE_WAITS.get(role, Span.WAIT)
        if kind == Span.STAGE_WAIT:
            if lane is not self._step:
                lane.free = end
            lane = self._step
        elif role == "experts" and len(self._kinds) < MOST_PER_STEP:
            lane.waits.append(len(self._kinds))
        elif lane.resumes:
            lane.free, lane.resumes = end, False
        self._add(lane, kind, begin, end)

    def _switched(self, event: str, between: tuple[Any, Any]) -> None:
        """The turn has gone from one computation to another. One that comes back to its turn goes
        on with an exchange, which is noted by itself.
        """
        now = self._now()
        origin, target = (self._turns.number_of(each) for each in between)
        if origin >= 0:
            lane = self._lanes[origin]
            computed = lane.free is not None
            self._close(lane, now, Span.OTHER)
            lane.resumes = computed
        if target >= 0 and not self._lanes[target].entered:
            self._lanes[target].entered, self._lanes[target].free = True, now

    # ----------------------------------------------------------------- notes

    def _lane(self) -> _Lane:
        number = self._turns.number_of(greenlet.getcurrent())
        if number >= 0:
            return self._lanes[number]
        return self._lanes[0] if self._in_forward else self._step

    def _close(self, lane: _Lane, now: float, kind: Span) -> None:
        """Ends the span of what was computed since the last note."""
        if lane.free is not None and now - lane.free >= _SHORTEST:
            self._add(lane, Span.SHARED_EXPERTS if lane.phase == DISPATCH else kind, lane.free, now)
        lane.free, lane.resumes = None, False

    def _add(self, lane: _Lane, kind: Span, begin: float, end: float) -> None:
        if len(self._kinds) == MOST_PER_STEP:
            self._num_dropped += 1
            return
        self._kinds.append((kind, lane.track, lane.layer))
        self._times.extend((begin, end))
