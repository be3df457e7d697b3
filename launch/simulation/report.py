"""What a simulation comes to, for people and programs: sizes in tokens, times in seconds, shares
from 0 to 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ...engine.planner.settings import Settings
from ...engine.simulation.simulation import Simulation
from .record import Record
from .times import FloorTimes
from .trace import Trace

LAW_P50, LAW_P99 = 2e-3, 4e-3  # seconds: the second is law 5 of the design for 99 % of the steps of 72 ranks


@dataclass(frozen=True)
class Spread:
    """Quantiles of a measurement; None where nothing was measured."""

    p50: float | None
    p90: float | None
    p99: float | None


@dataclass(frozen=True)
class Requests:
    """``refused`` are longer than the context (400), ``unavailable`` met a full queue (503);
    ``open`` are left when it was stopped.
    """

    asked: int
    finished: int
    refused: int
    unavailable: int
    open: int


@dataclass(frozen=True)
class Tokens:
    """Of prompts whose answer has begun, and of answers; rates over the simulated time."""

    input: int
    output: int
    input_per_second: float
    output_per_second: float
    input_per_second_per_rank: float
    output_per_second_per_rank: float


@dataclass(frozen=True)
class Prefix:
    """Tokens of the prompts that have left the queue, and how many of them needed not be
    computed.
    """

    asked: int
    saved: int
    share: float


@dataclass(frozen=True)
class PageUse:
    """Pages in use of those there are, over the time of steps: of all ranks, and the most on any
    one.
    """

    mean: float
    peak: float
    peak_of_a_rank: float


@dataclass(frozen=True)
class Steps:
    """``rows`` are sampled by all ranks together in a step, ``tokens`` computed. ``imbalance``:
    predicted seconds of the slowest rank over the mean. ``idle``: share of the time without a step;
    ``waiting``: share of the steps' time that ranks wait for the slowest.
    """

    count: int
    seconds: Spread
    rows: Spread
    tokens: Spread
    imbalance: Spread
    idle: float
    waiting: float


@dataclass(frozen=True)
class Measured:
    """Real seconds on the machine that simulates: of the planner for the results of a step and the
    plan that follows them, beside what law 5 of the design allows for that and for the sockets, at
    72 ranks; and of the whole simulation.
    """

    planner: Spread
    limit_p50: float
    limit_p99: float
    wall: float


@dataclass(frozen=True)
class SimulationReport:
    """``queue_wait`` ends with the plan that computes a request's first tokens. ``bound``: the part
    of the steps that the rest waited for, as shares of their time; ``held``: shares of the steps'
    time while waiting requests lacked sequence slots or pages, and while prompts were left over for
    later steps. ``binds`` says it in a sentence. All but ``measured`` is a function of recipe,
    trace and options.
    """

    trace: str
    complete: bool
    ranks: int
    seconds: float
    requests: Requests
    tokens: Tokens
    time_to_first_token: Spread
    time_between_tokens: Spread
    queue_wait: Spread
    prefix: Prefix
    pages: PageUse
    preemptions: int
    steps: Steps
    bound: dict[str, float]
    held: dict[str, float]
    binds: str
    measured: Measured

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def quantiles(
    values: ArrayLike, counts: ArrayLike | None = None, shares: Sequence[float] = (0.5, 0.9, 0.99)
) -> Spread:
    """The smallest values that no less than each share of all values reach; ``counts`` says how
    often each value stands.
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
    """The figures of a simulation that has ended, or was stopped."""
    ranks, seconds = settings.mesh.world, simulation.now
    requests = Requests(
        len(trace.requests),
        record.finished,
        record.refused,
        record.unavailable,
        len(trace.requests) - record.answered,
    )
    steps, wait = _steps(record, seconds), _of_known(record.started - record.arrived)
    pages, total = _pages(record), sum(record.seconds)
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
        binds=_binds(settings, _Causes(requests, wait, steps, pages, bound, held)),
        measured=Measured(quantiles(np.add(record.booking, record.planning)), LAW_P50, LAW_P99, wall),
    )


def _of_known(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> Spread:
    return quantiles(values[~np.isnan(values)])


def _tokens(trace: Trace, record: Record, seconds: float, ranks: int) -> Tokens:
    begun = ~np.isnan(record.first)
    given = int(np.array([request.num_input for request in trace.requests])[begun].sum())
    made, over = int(record.emitted.sum()), max(seconds, 1e-9)
    return Tokens(given, made, given / over, made / over, given / over / ranks, made / over / ranks)


def _prefix(trace: Trace, record: Record) -> Prefix:
    started = ~np.isnan(record.started)
    asked, saved = (
        int(np.array([request.num_input for request in trace.requests])[started].sum()),
        int(record.cached.sum()),
    )
    return Prefix(asked, saved, saved / max(1, asked))


def _pages(record: Record) -> PageUse:
    if not record.seconds:
        return PageUse(0.0, 0.0, 0.0)
    return PageUse(
        float(np.average(record.kv_used, weights=record.seconds)), max(record.kv_used), max(record.kv_fullest)
    )


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


# --------------------------------------------------------------------------- the closing sentence

_NOTABLE = 0.1  # share of the time from which something that holds requests up is what binds
_UNEVEN = 0.3  # share of the steps' time, waited for the slowest rank, from which that is what binds
_PARTS = {"compute": "computing", "memory": "memory bandwidth", "network": "the exchange between ranks"}


@dataclass(frozen=True)
class _Causes:
    """What the sentence is made of."""

    requests: Requests
    wait: Spread
    steps: Steps
    pages: PageUse
    bound: dict[str, float]
    held: dict[str, float]

    @property
    def prefill_binds(self) -> bool:
        """Prompts are often left over, and half of the requests wait for longer than steps take."""
        wait, step = self.wait.p50 or 0.0, self.steps.seconds.p99 or 0.0
        return self.held["prefill"] >= _NOTABLE and wait > 2 * step


def _binds(settings: Settings, causes: _Causes) -> str:
    """What to change first: what holds requests up before they run, or else what the steps' time
    goes into.
    """
    requests, steps, pages, bound, held = (
        causes.requests,
        causes.steps,
        causes.pages,
        causes.bound,
        causes.held,
    )
    if not steps.count:
        longer = f": all requests are longer than the context of {settings.max_len:,} tokens, which model.max_len and the pages limit"
        return f"Nothing ran{longer if requests.refused == requests.asked else ''}."
    part = max(bound, key=lambda name: bound[name])
    step = f"the steps' time is {_PARTS[part]} ({bound[part]:.0%} of it)"
    spec = settings.spec
    turned_away = f"; the queue of {spec.max_queue:,} (scheduler.max_queue) was full for {requests.unavailable:,} requests"
    tail = f"{turned_away if requests.unavailable else ''}."
    # In the order of the causes: without pages nobody gets a slot, and who has a slot waits for
    # prefill.
    if held["pages"] >= max(_NOTABLE, held["slots"]):
        what = f"KV pages bind: for {held['pages']:.0%} of the steps' time requests waited while sequence slots were free and pages not"
        return f"{what} (the fullest rank reached {pages.peak_of_a_rank:.0%}); {step}{tail}"
    if held["slots"] >= _NOTABLE:
        what = f"Sequence slots bind: for {held['slots']:.0%} of the steps' time requests waited while all {spec.max_running:,} of a rank"
        return f"{what} (scheduler.max_running) were taken on every rank, with at most {pages.peak:.0%} of the pages in use; {step}{tail}"
    if causes.prefill_binds:
        what = f"Prefill binds: in {held['prefill']:.0%} of the steps' time prompts were left over, as a step takes at most"
        limits = f"{spec.max_batch_tokens:,} tokens a rank (scheduler.max_batch_tokens) and {spec.inter_token_target:g} s beside decode"
        return f"{what} {limits} (scheduler.inter_token_target); {step}{tail}"
    if steps.waiting >= _UNEVEN:
        what = f"Imbalance binds: for {steps.waiting:.0%} of the steps' time ranks wait for the slowest"
        if held["prefill"] >= _NOTABLE:
            what += f", as few have prompts to compute and a step may take {spec.inter_token_target:g} s (scheduler.inter_token_target)"
        return f"{what}; {step}{tail}"
    if steps.idle >= 0.5:
        return f"Nothing binds: for {steps.idle:.0%} of the time there was no step; of the rest {step}{tail}"
    return f"Nothing holds requests up for long, so that what they see is the time of steps; {step}{tail}"
