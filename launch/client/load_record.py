"""Measurements of a server under traffic, in bounded memory per request."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from ..simulation.evaluate import quantiles
from ..simulation.report import Spread

_RESOLUTION = math.log(1.005)  # gaps are counted in steps of half a per cent
_SHORTEST = 1e-7  # seconds


class GapCounts:
    """Durations, counted by their logarithm: millions of them take a few kilobytes."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def add(self, seconds: float, count: int) -> None:
        self._counts[round(math.log(max(seconds, _SHORTEST)) / _RESOLUTION)] += count

    def spread(self) -> Spread:
        values = [math.exp(step * _RESOLUTION) for step in self._counts]
        return quantiles(values, list(self._counts.values()))


@dataclass(frozen=True)
class LoadReport:
    """Times in seconds, as clients saw them. ``asked``: requests of the trace.

    ``seconds``: from the first arrival to the last token. ``time_to_first_token`` counts from the
    moment at which a request should have been sent; ``lateness``: from there until it was.
    ``token_rate``: tokens per second of a request after its first token; its p99 is that of the
    fastest. ``input_tokens``: of prompts whose answer has begun; ``cached_tokens``: cached ones
    among ``measured_input_tokens``, the prompts of finished requests.
    """

    trace: str
    complete: bool
    asked: int
    sent: int
    finished: int
    failed: int
    open: int
    errors: dict[str, int]
    seconds: float
    input_tokens: int
    output_tokens: int
    input_per_second: float
    output_per_second: float
    measured_input_tokens: int
    cached_tokens: int
    time_to_first_token: Spread
    time_between_tokens: Spread
    token_rate: Spread
    lateness: Spread

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class LoadRecord:
    """Takes in what happens to requests; times in seconds since the start."""

    def __init__(self, source: str, asked: int) -> None:
        self.source, self.asked = source, asked
        self.sent = self.finished = self.failed = 0
        self.errors: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        self.gaps = GapCounts()
        self.input_tokens = self.output_tokens = self.measured_input_tokens = self.cached_tokens = 0
        self._first = array("d")
        self._rates = array("d")
        self._late = array("d")
        self._last = 0.0

    @property
    def open(self) -> int:
        return self.sent - self.finished - self.failed

    def begin(self, due: float, now: float) -> None:
        self.sent += 1
        self._late.append(now - due)

    def first(self, due: float, now: float, num_input: int) -> None:
        """The first token of an answer."""
        self._first.append(now - due)
        self.input_tokens += num_input

    def tokens(self, now: float, count: int) -> None:
        self.output_tokens += count
        self._last = max(self._last, now)

    def finish(self, rate: float | None, num_input: int, cached: int) -> None:
        self.finished += 1
        self.measured_input_tokens += num_input
        self.cached_tokens += cached
        if rate is not None:
            self._rates.append(rate)

    def fail(self, kind: str, problem: str) -> None:
        self.failed += 1
        self.errors[kind] += 1
        self.examples.setdefault(kind, problem)

    def report(self, *, complete: bool) -> LoadReport:
        over = max(self._last, 1e-9)
        return LoadReport(
            trace=self.source,
            complete=complete,
            asked=self.asked,
            sent=self.sent,
            finished=self.finished,
            failed=self.failed,
            open=self.open,
            errors=dict(self.errors.most_common()),
            seconds=self._last,
            input_tokens=self.input_tokens,
            output_tokens=self.output_tokens,
            input_per_second=self.input_tokens / over,
            output_per_second=self.output_tokens / over,
            measured_input_tokens=self.measured_input_tokens,
            cached_tokens=self.cached_tokens,
            time_to_first_token=quantiles(self._first),
            time_between_tokens=self.gaps.spread(),
            token_rate=quantiles(self._rates),
            lateness=quantiles(self._late),
        )
