"""Figures of a level of load: percentiles over its requests, rates over its rounds."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ..simulation.report import Spread
from .timing import TimedRequest


@dataclass(frozen=True)
class Round:
    """The requests of one round at one endpoint."""

    requests: tuple[TimedRequest, ...]

    @property
    def finished(self) -> list[TimedRequest]:
        return [request for request in self.requests if request.failure is None]

    @property
    def seconds(self) -> float:
        """From the first request sent to the last chunk, or to the last failure."""
        return max(each.end for each in self.requests) - min(each.sent for each in self.requests)

    @property
    def output_per_second(self) -> float:
        """Tokens of finished answers; those of failed ones do not count."""
        return sum(request.tokens for request in self.finished) / self.seconds

    @property
    def requests_per_second(self) -> float:
        return len(self.finished) / self.seconds

    @property
    def in_flight(self) -> float:
        """Mean number of requests in flight."""
        return sum(request.end - request.sent for request in self.requests) / self.seconds


@dataclass(frozen=True)
class Figures:
    """Times in seconds: percentiles over the finished requests of all rounds. Rates, and
    ``in_flight``: medians over rounds. ``errors``: failures by kind, with an example of each.
    ``short``: answers with fewer tokens than asked. ``without_usage``: answers whose tokens
    were counted by chunks. ``lateness``: from the moment a request was due until it left.
    """

    rounds: int
    asked: int
    finished: int
    short: int
    without_usage: int
    errors: dict[str, int]
    examples: dict[str, str]
    seconds: float
    output_tokens: int
    cached_tokens: int
    output_per_second: float
    requests_per_second: float
    in_flight: float
    ttft: Spread
    itl: Spread
    tpot: Spread
    latency: Spread
    lateness: Spread

    @property
    def failed(self) -> int:
        return self.asked - self.finished


def figures_of(rounds: Sequence[Round], output: int) -> Figures:
    """The figures of at least one round. ``output``: tokens asked of every request."""
    everyone = [request for each in rounds for request in each.requests]
    finished = [request for each in rounds for request in each.finished]
    failures = [request.failure.error for request in everyone if request.failure is not None]
    return Figures(
        rounds=len(rounds),
        asked=len(everyone),
        finished=len(finished),
        short=sum(request.tokens < output for request in finished),
        without_usage=sum(not request.usage for request in finished),
        errors=dict(Counter(error.kind for error in failures).most_common()),
        examples={error.kind: str(error) for error in reversed(failures)},
        seconds=sum(each.seconds for each in rounds),
        output_tokens=sum(request.tokens for request in finished),
        cached_tokens=sum(request.cached for request in finished),
        output_per_second=statistics.median(each.output_per_second for each in rounds),
        requests_per_second=statistics.median(each.requests_per_second for each in rounds),
        in_flight=statistics.median(each.in_flight for each in rounds),
        ttft=percentiles(request.ttft for request in finished),
        itl=percentiles(gap for request in finished for gap in request.itl),
        tpot=percentiles(tpot for request in finished if (tpot := request.tpot) is not None),
        latency=percentiles(request.latency for request in finished),
        lateness=percentiles(request.sent - request.due for request in everyone),
    )


def percentiles(values: Iterable[float]) -> Spread:
    """p50, p90 and p99 with linear interpolation, as the benchmarks named in ``timing`` do."""
    seen = np.fromiter(values, np.float64)
    if not len(seen):
        return Spread(None, None, None)
    return Spread(*np.percentile(seen, (50, 90, 99)).tolist())


@dataclass(frozen=True)
class Ratios:
    """Medians of an endpoint over those of another; None where one of them has none."""

    output_per_second: float | None
    requests_per_second: float | None
    ttft: float | None
    itl: float | None
    tpot: float | None
    latency: float | None


def ratios(ours: Figures, theirs: Figures) -> Ratios:
    """Ratios of the medians over rounds for rates, of p50 for times."""
    return Ratios(
        _ratio(ours.output_per_second, theirs.output_per_second),
        _ratio(ours.requests_per_second, theirs.requests_per_second),
        _ratio(ours.ttft.p50, theirs.ttft.p50),
        _ratio(ours.itl.p50, theirs.itl.p50),
        _ratio(ours.tpot.p50, theirs.tpot.p50),
        _ratio(ours.latency.p50, theirs.latency.p50),
    )


def _ratio(ours: float | None, theirs: float | None) -> float | None:
    return ours / theirs if ours is not None and theirs else None
