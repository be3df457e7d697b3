"""The interface of attention modules."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from ...kernels.reference.paged import PagedBatch
from ...kernels.reference.rope import Angles
from ...kernels.reference.sublayers import Residual
from ...parallel.tensor import Shard

LayerCache = tuple[Tensor, ...]


class Attention(nn.Module, ABC):
    """The attention of one layer, with the norm before it."""

    def shards(self) -> dict[str, Shard]:
        """The parts here of a checkpoint's tensors that are no matrices, by parameter."""
        return {}

    @abstractmethod
    def pack(self) -> None:
        """Brings matrices into the form that this device reads fastest."""

    @abstractmethod
    def forward(self, residual: Residual, rotation: Angles, batch: PagedBatch, cache: LayerCache) -> Residual:
        """The residual after attention, its update a summand where heads are split; T is at least
        1.
        """
