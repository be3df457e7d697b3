"""Dispatch within one rank: nothing travels."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.sublayers import Here
from ..kernels.table import column_for, ops_of
from .dispatch import Handle, Received
from .placement import Placement


class LocalDispatcher:
    """All experts live here. Tokens can still be dispatched, as between ranks: the readable reference."""

    def __init__(self, placement: Placement, device: torch.device) -> None:
        assert placement.num_ranks == 1, f"{placement.num_ranks} ranks, local dispatch serves 1"
        self.placement = placement
        self._weighted_sum = ops_of(column_for(device)).weighted_sum
        self.counts_LS = torch.zeros(placement.num_layers, placement.num_slots, dtype=torch.int64, device=device)
        self._slots_E = torch.from_numpy(placement.homes_LE).to(device).unbind()  # by layer
        self._shape: tuple[int, int] | None = None  # of a step
        self._here: list[Here] = []  # by layer

    def begin_step(self, num_tokens: int, capacity: int) -> None:
        assert num_tokens <= capacity, f"{num_tokens} tokens, capacity {capacity}"

    def here(self, layer: int, num_tokens: int, top_k: int) -> Here:
        if self._shape != (num_tokens, top_k):  # the first layer of a step with another number of tokens
            self._shape = num_tokens, top_k
            rows_M = torch.arange(num_tokens, device=self.counts_LS.device)[:, None].repeat(1, top_k).view(-1)
            self._here = [Here(slots_E, rows_M, counts_S) for slots_E, counts_S in zip(self._slots_E, self.counts_LS, strict=True)]
        return self._here[layer]

    def dispatch(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, layer: int) -> Handle:
        here = self.here(layer, *ids_TK.shape)
        return Handle(weights_TK, layer, Received(x_TD, here.rows_M, here.slots_L.index_select(0, ids_TK.view(-1))))

    def receive(self, handle: Handle) -> Received:
        assert isinstance(handle.state, Received)
        return handle.state

    def combine(self, y_MD: Tensor, handle: Handle) -> Tensor:
        return self._weighted_sum(y_MD.view(*handle.weights_TK.shape, y_MD.shape[1]), handle.weights_TK)
