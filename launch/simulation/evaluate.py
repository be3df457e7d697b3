"""Evaluates a simulation: from its record to its report."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from ...engine.planner.settings import Settings
from ...engine.simulation.simulation import Simulation
from .bottleneck import Causes, bottleneck
from .record import Record
from .report import (
    LAW_P50,
    LAW_P99,
    Measured,
    PageUse,
    Prefix,
    Requests,
    SimulationReport,
    Spread,
    Steps,
    Tokens,
)
from .times import FloorTimes
from .trace import Trace


def quantiles(
    values: ArrayLike, counts: ArrayLike | None = None, shares: Sequence[float] = (0.5, 0.9, 0.99)
) -> Spread:
    """Quantiles at ``shares``: for each the smallest value that at least that share of all values
    does not exceed. ``counts``: how often each value occurs.
    """
    seen = np.asarray(values, np.float64)
    if not len(seen):
        return Spread(None, None, None)
    order = seen.argsort(kind="stable")
    weights = np.ones(len(seen), np.int64) if counts is None else np.asarray(counts, np.int64)
    below = weights[order].cumsum()
    places = [int(below.searchsorted(share * below[-1])) for share in shares]
    return Spread(*(float(seen[order[min(place, len(seen) - 1)]]) for place in places))


def make_report(
    settings: Settings,
    trace: Trace,
    record: Record,
    simulation: Simulation,
    times: FloorTimes,
    *,
    wall: float,
    complete: bool,
) -> SimulationReport:
    """The report of a simulation that has ended (``complete``) or was stopped."""
    ranks, seconds = settings.mesh.world, simulation.now
    requests = Requests(
        len(trace.requests),
        record.finished,
        record.refused,
        record.unavailable,
        len(trace.requests) - record.answered,
    )
    steps = _steps(record, seconds)
    wait = _of_known(record.started - record.arrived)
    pages = _pages(record)
    total = sum(record.seconds)
    bound = _shares(times.bound, sum(times.bound.values()))
    held = _shares(record.held, total)
    return SimulationReport(
        trace=trace.source,
        complete=complete,
        ranks=ranks,
        seconds=seconds,
        requests=requests,
        tokens=_tokens(trace, record, seconds, ranks),
        time_to_first_token=_of_known(record.first - record.arrived),
        time_between_tokens=quantiles(record.gaps, record.gap_counts),
        queue_wait=wait,
        prefix=_prefix(trace, record),
        pages=pages,
        preemptions=simulation.planner.group.counters.preemptions,
        steps=steps,
        bound=bound,
        held=held,
        binds=bottleneck(settings, Causes(requests, wait, steps, pages, bound, held)),
        measured=Measured(quantiles(np.add(record.booking, record.planning)), LAW_P50, LAW_P99, wall),
    )


def _of_known(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> Spread:
    return quantiles(values[~np.isnan(values)])


def _tokens(trace: Trace, record: Record, seconds: float, ranks: int) -> Tokens:
    begun = ~np.isnan(record.first)
    given = int(np.array([request.num_input for request in trace.requests])[begun].sum())
    made = int(record.emitted.sum())
    over = max(seconds, 1e-9)
    return Tokens(given, made, given / over, made / over, given / over / ranks, made / over / ranks)


def _prefix(trace: Trace, record: Record) -> Prefix:
    started = ~np.isnan(record.started)
    asked = int(np.array([request.num_input for request in trace.requests])[started].sum())
    saved = int(record.cached.sum())
    return Prefix(asked, saved, saved / max(1, asked))


def _pages(record: Record) -> PageUse:
    if not record.seconds:
        return PageUse(0.0, 0.0, 0.0)
    mean = float(np.average(record.kv_used, weights=record.seconds))
    return PageUse(mean, max(record.kv_used), max(record.kv_fullest))


def _steps(record: Record, seconds: float) -> Steps:
    busy = sum(record.busy)
    return Steps(
        count=len(record.seconds),
        seconds=quantiles(record.seconds),
        rows=quantiles(record.rows),
        tokens=quantiles(record.tokens),
        imbalance=quantiles(record.imbalance),
        idle=max(0.0, 1 - busy / seconds) if seconds else 0.0,
        waiting=sum(record.waiting) / busy if busy else 0.0,
    )


def _shares(seconds: dict[str, float], total: float) -> dict[str, float]:
    return {name: part / total if total else 0.0 for name, part in seconds.items()}
