"""The load of experts, as ranks report it by slot.

Suffixes: L MoE layers, E logical experts, S expert slots of a rank, W ranks of a stage.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from ...moe.balance.placement import EMPTY, Placement
from ...parallel.mesh import Mesh
from ..protocol.arrays import Int64
from ..protocol.results import StepResult


class ExpertLoads:
    """Tokens of the last report by expert; replicas count together. ``layers``: the MoE layers of
    each stage. ``placement`` is that of the last report, ``newest`` that of the last plan.
    ``num_complete`` reports of all ranks have come.
    """

    def __init__(self, mesh: Mesh, layers: Sequence[slice], placement: Placement) -> None:
        self.layers = layers
        self.placement = self.newest = placement
        self.loads_LE = np.zeros((placement.num_layers, placement.num_experts), np.int64)
        self.num_complete = 0
        self._mesh = mesh
        self._counts_LWS: Int64 = np.zeros(placement.experts_LWS.shape, np.int64)
        self._later: deque[tuple[int, Placement]] = deque()
        self._heard: set[int] = set()
        self._step = -1

    def place(self, step: int, placement: Placement) -> None:
        """Reports of steps from ``step`` on count by ``placement``."""
        self.newest = placement
        self._later.append((step, placement))

    def take(self, reports: Sequence[StepResult]) -> None:
        """Takes in results that hold counts."""
        if not self.loads_LE.size:
            return
        for result in reports:
            self._turn_to(result.step)
            here = self._mesh.coordinates(result.rank)
            counts_LS = self._counts_LWS[self.layers[here.stage], here.expert]
            counts_LS[:] = np.frombuffer(result.expert_i64, np.int64).reshape(counts_LS.shape)
            self._heard.add(result.rank)
            if len(self._heard) == self._mesh.world:
                self.num_complete += 1
        if reports:
            self._add_up()

    def _turn_to(self, step: int) -> None:
        if step != self._step:
            self._step = step
            self._heard.clear()
        while self._later and step >= self._later[0][0]:
            self.placement = self._later.popleft()[1]
            self._counts_LWS[:] = 0

    def _add_up(self) -> None:
        """Replicas of an expert count together: once for all reports, with all places at once."""
        experts_LWS = self.placement.experts_LWS
        taken_LWS = experts_LWS != EMPTY
        rows_LWS = np.arange(len(experts_LWS))[:, None, None] * self.placement.num_experts + experts_LWS
        sums = np.bincount(rows_LWS[taken_LWS], self._counts_LWS[taken_LWS], self.loads_LE.size)
        self.loads_LE[:] = sums.reshape(self.loads_LE.shape)
