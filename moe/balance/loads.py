"""Expert load over a window of reports, and when it has drifted far enough to balance again.

Suffixes: L MoE layers, E logical experts.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .balance import weighted_imbalance
from .layers import Floats
from .placement import Placement


class LoadWindow:
    """Tokens per layer and expert in the last ``num_reports`` reports."""

    def __init__(self, num_layers: int, num_experts: int, num_reports: int) -> None:
        self._sum_LE = np.zeros((num_layers, num_experts), np.int64)
        self._parts: deque[NDArray[np.int64]] = deque()
        self._num_reports = num_reports

    @property
    def loads_LE(self) -> Floats:
        return self._sum_LE.astype(np.float64)

    def add(self, counts_LE: NDArray[np.int64]) -> None:
        """Takes a report: tokens since the report before it."""
        if len(self._parts) == self._num_reports:
            self._sum_LE -= self._parts.popleft()
        self._parts.append(counts_LE.copy())
        self._sum_LE += counts_LE


@dataclass(frozen=True)
class Trigger:
    """Balancing is due when maximum / mean load, averaged over layers by their load, exceeds that
    after the last balance by ``drift`` of it, and ranks met ``least_tokens`` in the mean of layers:
    with fewer, chance alone tilts the loads (by a thirtieth at 1,000).
    """

    drift: float = 0.05
    least_tokens: int = 2000

    def due(self, loads_LE: Floats, placement: Placement, reached: float) -> bool:
        """``reached``: ``weighted_imbalance`` after the last balance; 1 before the first."""
        per_rank = loads_LE.sum(axis=1).mean() / placement.num_ranks if len(loads_LE) else 0.0
        if per_rank < self.least_tokens:
            return False
        return weighted_imbalance(loads_LE, placement) > reached * (1 + self.drift)
