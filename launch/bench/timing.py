"""Times of one request as its client sees them.

TTFT, ITL and TPOT are those of ``vllm bench serve``. A chunk is an event of the stream with a
choice.

TTFT: from sending the request to its first chunk. Latency (end to end): to its last chunk. ITL:
each gap between two chunks (aiperf: inter chunk latency). TPOT: (latency - TTFT) / (output tokens -
1), one value per request (aiperf: inter token latency).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..client.server import ServerError


@dataclass(frozen=True)
class Failure:
    """``moment``: when it was noticed."""

    error: ServerError
    moment: float


@dataclass(frozen=True)
class TimedRequest:
    """Moments in seconds since the start of the round. ``due``: when it should have been sent.

    ``chunks``: arrivals. ``tokens``: of the answer, by the server's usage, or where it sends none
    (``usage`` false) as many as chunks. ``cached``: prompt tokens found in a cache.
    """

    due: float
    sent: float
    chunks: Sequence[float]
    tokens: int = 0
    usage: bool = False
    cached: int = 0
    failure: Failure | None = None

    @property
    def end(self) -> float:
        return self.failure.moment if self.failure else self.chunks[-1]

    @property
    def ttft(self) -> float:
        return self.chunks[0] - self.sent

    @property
    def latency(self) -> float:
        return self.chunks[-1] - self.sent

    @property
    def tpot(self) -> float | None:
        """None for an answer of one token."""
        return (self.latency - self.ttft) / (self.tokens - 1) if self.tokens > 1 else None

    @property
    def itl(self) -> list[float]:
        return [later - earlier for earlier, later in pairwise(self.chunks)]
