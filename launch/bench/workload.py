"""The requests of a benchmark: how many, of which lengths, and when they leave."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class OfferedLoad:
    """One level of load. Either ``concurrency`` requests are in flight until ``requests`` have
    been sent, or they leave as a Poisson process of ``rate`` per second, whatever the server does.
    """

    requests: int
    concurrency: int | None = None
    rate: float | None = None

    def __str__(self) -> str:
        return f"concurrency {self.concurrency}" if self.rate is None else f"rate {self.rate:g}/s"

    @property
    def level(self) -> float:
        """The concurrency or the rate."""
        return self.rate if self.rate is not None else float(self.concurrency or 0)

    def arrivals(self, draw: np.random.Generator) -> list[float]:
        """Seconds from the start at which requests are due; all at once for a concurrency."""
        if self.rate is None:
            return [0.0] * self.requests
        gaps = draw.exponential(1 / self.rate, self.requests)
        gaps[0] = 0.0  # the first one starts the clock
        moments: list[float] = gaps.cumsum().tolist()
        return moments


@dataclass(frozen=True)
class Workload:
    """``input`` and ``output``: tokens of every request. The first ``shared`` tokens of all prompts
    of a round are equal, the others random.
    """

    loads: tuple[OfferedLoad, ...]
    input: int
    output: int
    shared: int
    rounds: int
    seed: int

    def __str__(self) -> str:
        shared = f" ({self.shared:,} shared)" if self.shared else ""
        return f"{self.input:,} tokens in{shared}, {self.output:,} out"

    def prompts(self, count: int, vocab_size: int, draw: np.random.Generator) -> NDArray[np.int32]:
        """Token ids, a row for each prompt, drawn uniformly."""
        ids = draw.integers(0, vocab_size, (count, self.input), dtype=np.int32)
        ids[:, : self.shared] = ids[:1, : self.shared]
        return ids


def default_requests(concurrency: int | None, rate: float | None) -> int:
    """Four for each in flight, at least 8; or those of 30 seconds, 8 to 10,000."""
    if rate is None:
        return max(8, 4 * (concurrency or 0))
    return min(10_000, max(8, round(30 * rate)))
