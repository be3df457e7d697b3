"""Expert load over a window of reports, and when it has drifted far enough to balance again.

Suffixes: L MoE layers, E logical experts.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .balance import weighted_imbalance
from .layers import Floats
from .placement import Placement

_MOST_REPORTS = 16


class LoadWindow:
    """Tokens per layer and expert in the last ``num_reports`` reports, and in earlier ones, up to
    16 in all, until they hold ``least_tokens`` on average over layers.
    """

    def __init__(self, num_layers: int, num_experts: int, num_reports: int, least_tokens: int = 0) -> None:
        self._sum_LE = np.zeros((num_layers, num_experts), np.int64)
        self._parts: deque[NDArray[np.int64]] = deque()
        self._num_reports, self._least = num_reports, least_tokens * num_layers

    @property
    def loads_LE(self) -> Floats:
        return self._sum_LE.astype(np.float64)

    def add(self, counts_LE: NDArray[np.int64]) -> None:
        """Takes a report: tokens since the report before it."""
        self._parts.append(counts_LE.copy())
        self._sum_LE += counts_LE
        while len(self._parts) > self._num_reports and (
            len(self._parts) > _MOST_REPORTS or (self._sum_LE - self._parts[0]).sum() >= self._least
        ):
            self._sum_LE -= self._parts.popleft()


@dataclass(frozen=True)
class Trigger:
    """Balancing is due when maximum / mean load, averaged over layers by their load, exceeds that
    of the last balance by ``drift`` of it, and there were ``least_tokens``. Smaller imbalance
    stays: with a drift of 0.05 loads get no closer to the best placement than that.
    """

    drift: float = 0.03

    def least_tokens(self, num_ranks: int) -> int:
        """Tokens of all ranks, on average over layers, from which chance alone raises the load of
        the most loaded of equal ranks by no more than the drift.
        """
        return math.ceil(2 * math.log(max(2, num_ranks)) / self.drift**2) * num_ranks

    def due(self, loads_LE: Floats, placement: Placement, reached: float) -> bool:
        """``reached``: the ``weighted_imbalance`` that the last balance aimed at; 1 before the
        first.
        """
        tokens = loads_LE.sum(axis=1).mean() if len(loads_LE) else 0.0
        if tokens < self.least_tokens(placement.num_ranks):
            return False
        return weighted_imbalance(loads_LE, placement) > reached * (1 + self.drift)
