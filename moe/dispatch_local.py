"""Dispatch within one rank: the readable reference."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.table import column_for, ops_of
from .dispatch import Handle, Received
from .placement import Placement


class LocalDispatcher:
    """All experts live here; nothing travels."""

    def __init__(self, placement: Placement, device: torch.device) -> None:
        assert placement.num_ranks == 1, f"{placement.num_ranks} ranks, local dispatch serves 1"
        self.placement = placement
        self._weighted_sum = ops_of(column_for(device)).weighted_sum
        self.counts_LS = torch.zeros(placement.num_layers, placement.num_slots, dtype=torch.int64, device=device)
        self._slots_E = torch.from_numpy(placement.homes_LE).to(device).unbind()  # by layer
        self._rows_TK = torch.empty(0, 0, dtype=torch.int64, device=device)

    def begin_step(self, num_tokens: int, capacity: int) -> None:
        assert num_tokens <= capacity, f"{num_tokens} tokens, capacity {capacity}"

    def dispatch(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, layer: int) -> Handle:
        if self._rows_TK.shape != ids_TK.shape:  # the first layer of a step with another number of tokens
            self._rows_TK = torch.arange(len(ids_TK), device=ids_TK.device)[:, None].repeat(1, ids_TK.shape[1])
        slots_M = self._slots_E[layer].index_select(0, ids_TK.view(-1))
        return Handle(weights_TK, layer, Received(x_TD, self._rows_TK.view(-1), slots_M))

    def receive(self, handle: Handle) -> Received:
        assert isinstance(handle.state, Received)
        return handle.state

    def combine(self, y_MD: Tensor, handle: Handle) -> Tensor:
        return self._weighted_sum(y_MD.view(*handle.weights_TK.shape, y_MD.shape[1]), handle.weights_TK)
