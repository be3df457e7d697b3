"""Runs a group in virtual time: the controller's pilot against simulated ranks.

The order within a turn and the pacing are the controller's. Messages take no time: prompts, plans
and results arrive when they are sent. The planner's own time is measured but not added, so that
equal arrivals give equal results on any machine.
"""

from __future__ import annotations

import gc
import heapq
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..controller.pilot import Pilot
from ..planner.planner import Planner
from ..planner.request import Request, State
from ..planner.settings import Settings
from ..protocol.bulk import Preload, Preloaded
from ..protocol.frontends import Submit, TokenBatch
from ..protocol.message import Message
from ..protocol.results import StepResult
from .simulated_group import Executed, SimulatedGroup, StepWork

PATIENCE = 10_000
"""Steps in a row without a token for any request, beyond those of the longest prompt, after which
something is wrong."""

_STATES = {
    State.PRELOADING: "is being preloaded",
    State.READY: "waits for its first chunk",
    State.PREFILL: "is in prefill",
    State.DECODE: "decodes",
    State.DRAINING: "drains",
}


class Stuck(RuntimeError):
    """Requests are open and will never end; the message names the oldest."""


class StepTimes(Protocol):
    """Seconds [S, D] that each stage of each data index works on a step, without waiting for
    others.
    """

    def __call__(self, work: StepWork) -> NDArray[np.float64]: ...


@dataclass(frozen=True)
class StepSeen:
    """A step's virtual times: planned, first stage started, last stage ended. own_SD: as
    ``StepTimes``.
    """

    planned: float
    start: float
    end: float
    work: StepWork
    own_SD: NDArray[np.float64]


class Watcher(Protocol):
    """Observes a simulation; times are virtual seconds."""

    def told(self, now: float, messages: list[tuple[int, Message]]) -> None:
        """Frontends get these messages, given as (frontend, message)."""

    def stepped(self, planner: Planner, step: StepSeen) -> None:
        """The planner has made a plan, which runs as ``step``."""

    def measured(self, booking: float, planning: float) -> None:
        """The planner took so many real seconds to book the results before a plan, and to plan."""


Arrival = tuple[float, Submit]


def patience(settings: Settings) -> int:
    """Steps in a row without a token for any request, after which a simulation is stuck.

    While no request decodes, a prompt advances by ``max_batch_tokens`` at each turn of its cohort.
    """
    chunks = -(-settings.max_len // settings.spec.max_batch_tokens)
    return PATIENCE + settings.mesh.num_cohorts * chunks


class Simulation:
    """Runs one group from its first arrival until everything is answered."""

    def __init__(self, settings: Settings, times: StepTimes, watcher: Watcher) -> None:
        self.now = 0.0
        self._pilot = Pilot(settings)
        self._times, self._watcher = times, watcher
        self._group = SimulatedGroup(settings)
        self._results: list[tuple[float, int, list[StepResult]]] = []  # due at, order, results
        self._sent = 0
        self._free_at = [0.0] * settings.mesh.pipeline  # when each stage has done its work
        self._sampled_at = [0.0] * settings.mesh.pipeline  # when each cohort has its last tokens
        self._booking = 0.0
        self._barren = 0  # steps since the last token for any request
        self._patience = patience(settings)

    @property
    def planner(self) -> Planner:
        return self._pilot.planner

    def run(self, arrivals: Iterator[Arrival], stopped: Callable[[], bool] = lambda: False) -> bool:
        """Serves arrivals, whose times ascend. Returns False when ``stopped`` ended it before all
        were answered. Raises Stuck.
        """
        coming = next(arrivals, None)
        gc.disable()
        try:
            while not stopped():
                due = self._due(math.inf if coming is None else coming[0])
                if due == math.inf:
                    if self.planner.idle():
                        return True
                    raise Stuck(f"nothing can happen any more, but {self._oldest()}")
                self.now = max(self.now, due)
                self._book()
                if self._pilot.due(self.now):
                    self._plan()
                while coming is not None and coming[0] <= self.now:
                    self._pilot.submit(0, coming[1])
                    coming = next(arrivals, None)
                self._follow_up()
            return False
        finally:
            gc.enable()

    def _due(self, arrival: float) -> float:
        """Time of the next event; infinity when there will be none."""
        result = self._results[0][0] if self._results else math.inf
        return min(arrival, result, self.now + self._pilot.wait(self.now))

    def _book(self) -> None:
        """Books the results that have come in by now."""
        results: list[StepResult] = []
        while self._results and self._results[0][0] <= self.now:
            results += heapq.heappop(self._results)[2]
        if results:
            step_seconds = max(result.seconds for result in results)
            began = time.perf_counter()
            self._pilot.book(results, self.now, step_seconds)
            self._booking += time.perf_counter() - began

    def _plan(self) -> None:
        began = time.perf_counter()
        plan = self._pilot.plan(self.now)
        planning = time.perf_counter() - began
        if plan is None:
            return
        self._watcher.measured(self._booking, planning)
        self._booking = 0.0
        self._watcher.stepped(self.planner, self._execute(self._group.execute(plan)))
        self._barren += 1
        if self._barren > self._patience:
            raise Stuck(f"nobody has got a token for {self._patience} steps, and {self._oldest()}")

    def _execute(self, step: Executed) -> StepSeen:
        """A stage begins a step when it has the plan and the output of the stage before, and has
        finished its previous step.
        """
        own_SD, cohort = self._times(step.work), step.header.cohort
        end = start = max(self.now, self._free_at[0], self._sampled_at[cohort])
        for stage, own_D in enumerate(own_SD):
            end = max(end, self._free_at[stage]) + float(own_D.max())
            self._free_at[stage] = end
            heapq.heappush(self._results, (end, self._sent, self._group.results(step, stage, own_D)))
            self._sent += 1
        self._sampled_at[cohort] = end
        return StepSeen(self.now, start, end, step.work, own_SD)

    def _follow_up(self) -> None:
        """Delivers the planner's messages; ranks acknowledge prompts at once."""
        staging, output = self._pilot.follow_up()
        for rank, message in staging:
            self._group.stage(message)
            if isinstance(message, Preload):
                self._pilot.staged(Preloaded(rank, message.staged))
        if output:
            if any(isinstance(message, TokenBatch) for _, message in output):
                self._barren = 0
            self._watcher.told(self.now, output)

    def _oldest(self) -> str:
        request = min(self.planner.group.open.values(), key=lambda request: request.order, default=None)
        if request is None:
            return "the planner is not idle, though no request is open"
        size = f"{request.num_prompt} prompt tokens, limit {request.limit}"
        return f"request {request.request_id} ({size}) {self._condition(request)}"

    def _condition(self, request: Request) -> str:
        if request.row < 0:
            return f"waits at {self.now:.3f} s"
        return f"{_STATES[int(self.planner.group.rows.state[request.row])]} at {self.now:.3f} s"
