"""The report of a simulation: sizes in tokens, times in seconds, shares from 0 to 1."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .experts import ExpertBalance

LAW_P50, LAW_P99 = 2e-3, 4e-3  # seconds: law 5 of the design, for 72 ranks


@dataclass(frozen=True)
class Spread:
    """Quantiles of a measurement; None if nothing was measured."""

    p50: float | None
    p90: float | None
    p99: float | None


@dataclass(frozen=True)
class Requests:
    """``refused``: longer than the context (400). ``unavailable``: met a full queue (503).
    ``open``: unanswered when the simulation was stopped.
    """

    asked: int
    finished: int
    refused: int
    unavailable: int
    open: int


@dataclass(frozen=True)
class Tokens:
    """Tokens of prompts whose answer has begun, and of answers; rates over the simulated time."""

    input: int
    output: int
    input_per_second: float
    output_per_second: float
    input_per_second_per_rank: float
    output_per_second_per_rank: float


@dataclass(frozen=True)
class Prefix:
    """Tokens of the prompts that have left the queue, and those saved by the prefix cache."""

    asked: int
    saved: int
    share: float


@dataclass(frozen=True)
class PageUse:
    """Share of pages in use during steps: mean and peak of all ranks, peak of any one rank."""

    mean: float
    peak: float
    peak_of_a_rank: float


@dataclass(frozen=True)
class Steps:
    """``rows`` sampled and ``tokens`` computed per step by all ranks together.

    ``imbalance``: predicted seconds of the slowest rank / mean over ranks. ``idle``: share of the
    time without a step. ``waiting``: share of step time in which ranks wait for the slowest.
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
    """Real seconds on the simulating machine.

    ``planner``: taking in the results of a step and planning the next. The limits are those of
    law 5 of the design, which include sockets, at 72 ranks. ``wall``: the whole simulation.
    """

    planner: Spread
    limit_p50: float
    limit_p99: float
    wall: float


@dataclass(frozen=True)
class SimulationReport:
    """All of it but ``measured`` is a function of recipe, trace and options.

    ``queue_wait`` ends with the plan that computes a request's first tokens. ``bound``: share of
    step time by the slowest part of each step. ``held``: share of step time in which waiting
    requests lacked sequence slots or pages, or prompts were left for later steps. ``binds``: the
    bottleneck in a sentence. ``experts``: None where loads are even.
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
    experts: ExpertBalance | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
