"""A recipe under a trace of requests: the planner that would serve it, on the cluster that ``launch
plan`` describes, in virtual time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from ...engine.planner.settings import Settings
from ...engine.simulation.simulation import Arrival, Simulation
from ..capacity.plan import CapacityPlan
from ..recipe.recipe import Recipe
from ..recipe.resolve import scheduler_spec
from .record import Record
from .report import SimulationReport, make_report
from .times import FloorTimes
from .trace import Trace


@dataclass(frozen=True)
class Progress:
    """How far a simulation has come: virtual ``seconds``, and of ``asked`` requests those that have
    arrived and been answered.
    """

    seconds: float
    asked: int
    arrived: int
    answered: int


StopAfter = Callable[[Progress], bool]
"""Told of progress at every turn; whether to stop."""


def settings_of(plan: CapacityPlan, recipe: Recipe) -> Settings:
    """What the controller would make its planner with: the pools and the longest context that the
    plan finds.
    """
    setup = plan.setup
    pages = plan.kv_tokens_per_rank // setup.page_size
    return Settings(
        setup.mesh,
        scheduler_spec(recipe),
        [pages] * setup.mesh.data,
        setup.page_size,
        plan.longest_context,
    )


def simulate_plan(
    plan: CapacityPlan, recipe: Recipe, trace: Trace, efficiency: float, told: StopAfter
) -> SimulationReport:
    """Serves a trace until the last request is answered, or ``told`` says stop. The plan must fit.
    Raises ``engine.simulation.Stuck``.
    """
    assert plan.fits, "there is no cluster to simulate"
    settings = settings_of(plan, recipe)
    record = Record(np.array([request.seconds for request in trace.requests]))
    times = FloorTimes(plan.setup, efficiency)
    simulation = Simulation(settings, times, record)
    counter = _Counter(trace.arrivals(settings))
    began = time.perf_counter()
    complete = simulation.run(iter(counter), partial(_tell, told, simulation, record, counter))
    wall = time.perf_counter() - began
    return make_report(settings, trace, record, simulation, times, wall=wall, complete=complete)


class _Counter:
    """Counts arrivals as they are taken."""

    def __init__(self, arrivals: Iterator[Arrival]) -> None:
        self._arrivals = arrivals
        self.count = 0

    def __iter__(self) -> Iterator[Arrival]:
        for arrival in self._arrivals:
            self.count += 1
            yield arrival


def _tell(told: StopAfter, simulation: Simulation, record: Record, counter: _Counter) -> bool:
    return told(Progress(simulation.now, len(record.arrived), counter.count, record.answered))
