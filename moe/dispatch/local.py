"""Dispatch within one rank: nothing travels.

Suffixes: T tokens, K choices per token, M = T K pairs, L MoE layers, S expert slots, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from ...kernels.reference.sublayers import Here
from ..balance.placement import Placement

_T = TypeVar("_T")


class LocalDispatcher:
    """All experts live here. ``counts_LS`` as ``Exchange``'s."""

    def __init__(self, placement: Placement, device: torch.device) -> None:
        assert placement.num_ranks == 1, f"{placement.num_ranks} ranks, local dispatch serves 1"
        self.placement = placement
        self.counts_LS = torch.zeros(
            placement.num_layers, placement.num_slots, dtype=torch.int64, device=device
        )
        self._slots_E = torch.from_numpy(placement.homes_LE).to(device).unbind()  # by layer
        self._shape: tuple[int, int] | None = None  # of a step
        self._here: list[Here] = []  # by layer

    def begin_step(self, num_tokens: int, capacity: int) -> None:
        assert num_tokens <= capacity, f"{num_tokens} tokens, capacity {capacity}"

    def run(self, layer: int, shape: tuple[int, int], compute: Callable[[Here], _T]) -> _T:
        """What ``compute`` makes of where the experts of a layer are. ``shape``: T and K."""
        if self._shape != shape:  # the first layer of a step with another number of tokens
            self._shape, (num_tokens, top_k) = shape, shape
            rows_M = torch.arange(num_tokens, device=self.counts_LS.device)[:, None].repeat(1, top_k).view(-1)
            self._here = [
                Here(slots_E, rows_M, counts_S)
                for slots_E, counts_S in zip(self._slots_E, self.counts_LS, strict=True)
            ]
        return compute(self._here[layer])
