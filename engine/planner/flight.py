"""Plans in flight: sent, and not yet acknowledged by all ranks."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..protocol.arrays import Int64, UInt64


@dataclass
class Check:
    """The state that a checksummed plan should leave on each data index.

    rows [n]: slots active after it. sent [n]: the lengths of those still in prefill, -1 where
    results decide. pages [D]: sums of the page-table terms. ``expected`` has a data index once its
    sampled counts are in; ``reported`` has the checksum of each rank.
    """

    rows: Int64
    sent: Int64
    pages: UInt64
    expected: dict[int, int] = field(default_factory=dict)
    reported: dict[int, int] = field(default_factory=dict)


@dataclass
class Flight:
    """A plan that was sent and not yet acknowledged by all ranks.

    rows [n]: the rows that sample, in result order, data-major; data index d owns
    rows[offsets[d]:offsets[d + 1]]. decode [n]: whether the row decodes (its length grows by what
    it emits). tokens, kv and context [D] are the cost model's features. prompts [m]: the rows whose
    prompts advance, data-major, in the order of each section's ``extend``. The rest is read by
    ``Overlap``: ``unheard``: ranks whose results are missing; of the others, the longest seconds
    and the smallest share of them spent waiting.
    """

    step: int
    rows: Int64
    decode: NDArray[np.bool_]
    offsets: list[int]
    tokens: Int64
    kv: Int64
    context: Int64
    prompts: Int64
    check: Check | None = None
    capacity: int = 0
    microbatches: int = 1
    unheard: int = 0
    seconds: float = 0.0
    waits: float = 1.0

    def span(self, data: int) -> slice:
        """The part of ``rows`` that ``data`` owns."""
        return slice(self.offsets[data], self.offsets[data + 1])
