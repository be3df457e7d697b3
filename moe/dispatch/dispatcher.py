"""The dispatch seam: tokens meet their experts, on whichever rank those are.

A layer hands its experts to a dispatcher, which runs them. ``LocalDispatcher``: all experts are on
this rank, nothing travels, and norm, gate and experts are one sublayer. ``ExchangeDispatcher``:
tokens travel to the ranks of their experts, and outputs travel back, by an exchange.
Every rank runs the same layers in the same order in every step, with or without tokens of its own.

Suffixes: T own tokens, K choices per token, D hidden, N received tokens (padded ones included), M
pairs (token, choice) for the experts of this rank, L MoE layers, S expert slots of this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ...kernels.reference.fp8 import Normed
from ...kernels.reference.sublayers import ExpertsSublayer, Residual
from ..balance.placement import Placement
from ..clock import PhaseClock
from .rows import Tokens


@dataclass(frozen=True)
class Received:
    """The work of this rank. x_ND in the model's dtype, or quantised for experts in FP8; rows_M
    int64 into x_ND; slots_M int64 own slots, -1 for padding.
    """

    x_ND: Tokens
    rows_M: Tensor
    slots_M: Tensor


@dataclass(frozen=True)
class RoutedExperts:
    """The gate and the experts of one layer, as a dispatcher calls them. ``top_k`` is K.

    ``choose``: the sum of the residual, its norm, ids_TK int64 of logical experts, weights_TK
    float32. ``compute``: y_MD, unweighted, of what was received; adds the tokens of every slot to
    counts_S. ``sublayer``: both at once, where all experts are local.
    """

    top_k: int
    choose: Callable[[Residual], tuple[Tensor, Normed, Tensor, Tensor]]
    compute: Callable[[Received, Tensor], Tensor]
    sublayer: ExpertsSublayer


class Dispatcher(Protocol):
    """Runs the experts of a layer. ``clock``: seconds of the phases of all layers; it may change
    between two steps.
    """

    clock: PhaseClock

    @property
    def placement(self) -> Placement: ...

    @property
    def counts_LS(self) -> Tensor:
        """int64 on the device: tokens of every own slot since the counts were last zeroed."""
        ...

    def place(self, placement: Placement, layers: Sequence[int]) -> None:
        """Takes over a ``placement`` (of all layers) in which experts of ``layers`` have moved.
        Called between two steps. Tables on a device keep their addresses, which captured steps
        know.
        """
        ...

    def begin_step(self, num_tokens: int, capacity: int, real_1: Tensor | None = None) -> None:
        """Announces a step: T of every layer, and the bound on T over all ranks. ``real_1`` int64
        [1], on the device: tokens from there on are padding, and go to no expert; None: none are.
        """
        ...

    def run(
        self, layer: int, routed: RoutedExperts, residual: Residual, shared: Callable[[Normed], Tensor | None]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns the sum of the residual; the experts' outputs for its norm, weighted and summed
        in float32 in the order of k; and the result of ``shared`` for the norm. ``shared`` runs
        while tokens travel.
        """
        ...


def padding_of(num_tokens: int, real_1: Tensor | None) -> Tensor | None:
    """padding_T1 bool: tokens that are padding, by ``real_1`` of ``begin_step``."""
    if real_1 is None:
        return None
    return torch.arange(num_tokens, device=real_1.device)[:, None] >= real_1


def zero_counts(placement: Placement, device: torch.device) -> Tensor:
    """Zeros for ``counts_LS``."""
    return torch.zeros(placement.num_layers, placement.num_slots, dtype=torch.int64, device=device)
