"""Simulates a recipe under a request trace: the real planner on a simulated cluster."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from msgspec import structs

from ...engine.planner.settings import Settings
from ...engine.simulation.simulation import Arrival, Simulation
from ..capacity.plan import CapacityPlan
from ..recipe.recipe import Recipe
from ..recipe.resolve import scheduler_spec
from .evaluate import make_report
from .experts import ExpertBalance
from .record import Record
from .report import SimulationReport
from .times import FloorTimes
from .trace import Trace


@dataclass(frozen=True)
class Progress:
    """Virtual seconds, and how many of the ``asked`` requests arrived and were answered."""

    seconds: float
    asked: int
    arrived: int
    answered: int


StopAfter = Callable[[Progress], bool]
"""Called with the progress at every turn; returns whether to stop."""


def settings_of(plan: CapacityPlan, recipe: Recipe) -> Settings:
    """The planner's settings, with the page pools and longest context of the capacity plan.
    Modelled steps overlap exchange and computation already, so no step needs microbatches.
    """
    setup = plan.setup
    pages = plan.kv_tokens_per_rank // setup.page_size
    return Settings(
        setup.mesh,
        structs.replace(scheduler_spec(recipe), overlap="off"),
        [pages] * setup.mesh.data,
        setup.page_size,
        plan.longest_context,
    )


def simulate_plan(
    plan: CapacityPlan,
    recipe: Recipe,
    trace: Trace,
    efficiency: float,
    stop_after: StopAfter,
    experts: ExpertBalance | None = None,
) -> SimulationReport:
    """Serves a trace until every request is answered or ``stop_after`` returns True.

    The plan must fit. Raises ``engine.simulation.simulation.Stuck``.
    """
    assert plan.fits, "a plan that does not fit has no cluster to simulate"
    settings = settings_of(plan, recipe)
    record = Record(np.array([request.seconds for request in trace.requests]))
    times = FloorTimes(plan.setup, efficiency, 1.0 if experts is None else experts.simulated)
    simulation = Simulation(settings, times, record)
    counter = _Counter(trace.arrivals(settings))
    began = time.perf_counter()
    complete = simulation.run(iter(counter), partial(_tell, stop_after, simulation, record, counter))
    wall = time.perf_counter() - began
    report = make_report(settings, trace, record, simulation, times, wall=wall, complete=complete)
    return replace(report, experts=experts)


class _Counter:
    """Counts the arrivals that the simulation takes."""

    def __init__(self, arrivals: Iterator[Arrival]) -> None:
        self._arrivals = arrivals
        self.count = 0

    def __iter__(self) -> Iterator[Arrival]:
        for arrival in self._arrivals:
            self.count += 1
            yield arrival


def _tell(stop_after: StopAfter, simulation: Simulation, record: Record, counter: _Counter) -> bool:
    return stop_after(Progress(simulation.now, len(record.arrived), counter.count, record.answered))
