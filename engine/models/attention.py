"""The interface of attention modules."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from ...kernels.reference.paged import PagedBatch
from ...kernels.reference.rope import Angles
from ...kernels.reference.sublayers import Residual

LayerCache = tuple[Tensor, ...]


class Attention(nn.Module, ABC):
    """The attention of one layer, with the norm before it."""

    @abstractmethod
    def pack(self) -> None:
        """Brings matrices into the form that this device reads fastest."""

    @abstractmethod
    def forward(self, residual: Residual, rotation: Angles, batch: PagedBatch, cache: LayerCache) -> Residual:
        """The residual after attention, its update a summand where heads are split; T is at least
        1.
        """
