"""The base of exchanges on GPUs within a capacity: sizes follow from it, counts stay on the device
and the host reads nothing, so a step can be captured.

Suffixes: T own tokens, K choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...parallel.one_epoch import OneEpochGroup
from ..balance.placement import EMPTY, Placement
from .exchange import Handle
from .replicas import PlacedExchange, ReplicaChoice


@dataclass(frozen=True)
class TokenShape:
    """Sizes of the tokens of an exchange. ``capacities``: most tokens of a rank in a step; then, if
    steps may have two microbatches, most in one of them. ``eight``: they travel to experts in FP8,
    as experts in FP8 quantise them, and return in ``dtype``.
    """

    capacities: tuple[int, ...]
    top_k: int
    hidden: int
    dtype: torch.dtype
    eight: bool = False


class CapacityExchange(PlacedExchange):
    """Base of exchanges through the memory of ``group``, of tokens of ``shape``."""

    def __init__(
        self,
        placement: Placement,
        group: OneEpochGroup,
        device: torch.device,
        shape: TokenShape,
        node_W: Sequence[int] | None = None,
    ) -> None:
        super().__init__(placement, group.size, ReplicaChoice(placement, group.index, node_W, device))
        self._shape, self._capacity = shape, 0

    def begin_step(self, num_tokens: int, capacity: int) -> None:
        most = self._shape.capacities[0]
        assert num_tokens <= capacity <= most, f"{num_tokens} tokens, capacity {capacity}, at most {most}"
        self._capacity = capacity
        self._choice.begin_step(num_tokens)

    def forward(self, handle: Handle) -> None:
        """Does nothing: counts travel with the tokens, which are on their way."""

    def _places_TK(self, ids_TK: Tensor, layer: int) -> Tensor:
        """rank x S + slot of every choice; EMPTY where ids are -1, which are padding."""
        return torch.where(ids_TK >= 0, self._choice.places_TK(ids_TK.clamp_min(0), layer), EMPTY)
