"""The draws of rows, by the settings and the numbers that decide them.

Suffixes: R rows, S of them, V vocabulary or a part of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ...kernels.reference.column import Reference
from ...kernels.reference.sampling import Purpose, SamplingParams, uniform
from ..protocol.arrays import Int64


@dataclass(frozen=True)
class Draws:
    """Settings of rows [R], their seeds, and the positions of the tokens to draw."""

    params: SamplingParams
    seed: Int64
    positions: Int64

    @property
    def uniform_R(self) -> NDArray[np.float64]:
        """The numbers that decide. Greedy rows read none."""
        if not len(self.params.drawn_S):
            return np.zeros(len(self.positions))
        return uniform(self.seed, self.positions, Purpose.SAMPLE)

    def rows(self, rows_S: Int64) -> Draws:
        """Those of some rows."""
        params = SamplingParams(
            self.params.temperature_R[rows_S],
            self.params.top_k_R[rows_S],
            self.params.top_p_R[rows_S],
            self.params.min_p_R[rows_S],
        )
        return Draws(params, self.seed[rows_S], self.positions[rows_S])

    def among(self, logits_RV: Tensor, ops: Reference) -> Tensor:
        """Tokens [R] int64 by logits."""
        return ops.sample(logits_RV, self.params, self.uniform_R)
