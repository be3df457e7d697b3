"""A histogram cheap enough to observe every token (prometheus_client's takes a lock and 1.5 us per
observation).
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Sequence

from prometheus_client.core import HistogramMetricFamily


class Histogram:
    """Counts by upper bound. For one thread: a reader in another one may see an observation counted
    but not yet summed.
    """

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def pack(self) -> tuple[list[int], float]:
        """Counts by bucket and the sum, for ``add``."""
        return list(self._counts), self._sum

    def add(self, counts: Sequence[int], total: float) -> None:
        """Adds the observations of another histogram with the same bounds."""
        assert len(counts) == len(self._counts), f"{len(counts)} buckets, {len(self._counts)} expected"
        for index, count in enumerate(counts):
            self._counts[index] += count
        self._sum += total

    def filled(self, counts_i64: bytes, total: float) -> Histogram:
        """Adds counts packed as int64 by bucket, if there are any; returns the histogram."""
        if counts_i64:
            self.add(array("q", counts_i64).tolist(), total)
        return self

    def family(
        self, name: str, text: str, names: Sequence[str], labels: Sequence[str]
    ) -> HistogramMetricFamily:
        """A family with this histogram as its only sample."""
        family = HistogramMetricFamily(name, text, labels=names)
        self.add_to(family, labels)
        return family

    def add_to(
        self, family: HistogramMetricFamily, labels: Sequence[str], limit: float = float("inf")
    ) -> None:
        """Adds a sample to a family; bounds above ``limit`` are left to +Inf."""
        total = 0
        buckets: list[tuple[str, float]] = []
        for bound, count in zip(self._bounds, self._counts, strict=False):
            total += count
            if bound <= limit:
                buckets.append((str(float(bound)), total))
        family.add_metric(labels, [*buckets, ("+Inf", sum(self._counts))], self._sum)
