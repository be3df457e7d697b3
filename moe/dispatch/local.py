"""Dispatch within one rank: nothing travels.

Suffixes: T tokens, K choices per token, M = T K pairs, L MoE layers, S expert slots, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...kernels.reference.fp8 import Normed
from ...kernels.reference.sublayers import LocalExperts, Residual
from ..balance.placement import Placement
from ..clock import PhaseClock, clock_for
from ..phases import EXPERT
from .dispatcher import RoutedExperts, padding_of, zero_counts


class LocalDispatcher:
    """All experts are on this rank. A layer is one sublayer; all of its time is the experts'."""

    def __init__(self, placement: Placement, device: torch.device, clock: PhaseClock | None = None) -> None:
        assert placement.num_ranks == 1, f"{placement.num_ranks} ranks, local dispatch serves 1"
        self.placement = placement
        self.counts_LS = zero_counts(placement, device)
        self.clock = clock_for(device) if clock is None else clock
        self._slots_E = torch.from_numpy(placement.homes_LE).to(device).unbind()  # by layer
        self._shape: tuple[int, int] | None = None  # T and K of ``_places``
        self._places: list[LocalExperts] = []  # by layer
        self._padding_T1: Tensor | None = None

    def place(self, placement: Placement, layers: Sequence[int]) -> None:
        raise AssertionError("a single rank cannot move experts")

    def begin_step(self, num_tokens: int, capacity: int, real_1: Tensor | None = None) -> None:
        assert num_tokens <= capacity, f"{num_tokens} tokens, capacity {capacity}"
        self.clock.begin_step()
        if real_1 is not None or self._padding_T1 is not None:
            self._shape = None  # a captured step makes places of its own
        self._padding_T1 = padding_of(num_tokens, real_1)

    def run(
        self, layer: int, routed: RoutedExperts, residual: Residual, shared: Callable[[Normed], Tensor | None]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        self.clock.mark()
        shape = len(residual[0]), routed.top_k
        if self._shape != shape:  # first layer of a step whose number of tokens differs
            self._places = self._places_of(*shape)
            self._shape = shape
        places = self._places[layer]
        if self._padding_T1 is not None:
            padding_M = self._padding_T1.expand(-1, routed.top_k).flatten()
            places = replace(places, padding_M=padding_M)
        x_TD, normed, routed_TD = routed.sublayer(residual, places)
        self.clock.lap(EXPERT)
        return x_TD, routed_TD, shared(normed)

    def _places_of(self, num_tokens: int, top_k: int) -> list[LocalExperts]:
        rows_M = torch.arange(num_tokens, device=self.counts_LS.device)[:, None].repeat(1, top_k).view(-1)
        layers = zip(self._slots_E, self.counts_LS, strict=True)
        return [LocalExperts(slots_E, rows_M, counts_S) for slots_E, counts_S in layers]
