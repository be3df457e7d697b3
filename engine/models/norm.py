"""The RMS norm of a model."""

from __future__ import annotations

from torch import Tensor, nn

from ...kernels.reference.column import Reference
from ...kernels.reference.sublayers import RowNorm
from ...parallel.linear import Backend


class Norm(nn.Module):
    """RMS norm over ``dim`` values."""

    def __init__(self, dim: int, eps: float, backend: Backend[Reference]) -> None:
        super().__init__()
        self.weight = backend.parameter(dim)
        self.row = RowNorm(self.weight, eps)
        self._rms_norm = backend.ops.rms_norm

    def forward(self, x: Tensor) -> Tensor:
        return self._rms_norm(x, self.row.weight, self.row.eps)
