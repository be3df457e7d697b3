"""The dispatch seam: tokens meet their experts, wherever those live. A dispatcher is one of two
kinds.

``LocalDispatcher``: all experts of a layer live on this rank, nothing travels, and the layer is
computed at once.

``Exchange``: tokens travel to the ranks of their experts and the experts' outputs travel back. A
layer calls ``dispatch`` (the exchange starts), does what it can meanwhile, calls ``receive``, runs
its experts and calls ``combine``. Every rank makes the same calls in the same order in every step,
with or without tokens of its own.

Suffixes: T own tokens, K choices per token, D hidden, N received tokens (padded ones included), M
pairs (token, choice) for the experts of this rank, L MoE layers, S expert slots of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from ..balance.placement import Placement
from .local import LocalDispatcher


@dataclass(frozen=True)
class Handle:
    """An exchange under way: what ``receive`` and ``combine`` need to know of it. ``state`` belongs
    to the dispatcher.
    """

    weights_TK: Tensor
    layer: int
    state: Any = None


@dataclass(frozen=True)
class Received:
    """The work of this rank. x_ND in the model's dtype; rows_M int64 into x_ND; slots_M int64 own
    slots, -1 for padding.
    """

    x_ND: Tensor
    rows_M: Tensor
    slots_M: Tensor


class Exchange(Protocol):
    """What a way for tokens to travel must offer."""

    @property
    def placement(self) -> Placement: ...

    @property
    def counts_LS(self) -> Tensor:
        """int64 on the device: tokens met by every own slot since it was last zeroed."""
        ...

    def begin_step(self, num_tokens: int, capacity: int) -> None:
        """Announces a step: T of every layer, and the bound on T over all ranks."""
        ...

    def dispatch(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, layer: int) -> Handle:
        """Starts sending tokens to their experts. ids_TK int64 logical experts; weights_TK
        float32.
        """
        ...

    def receive(self, handle: Handle) -> Received:
        """Waits for the tokens that other ranks have sent here."""
        ...

    def combine(self, y_MD: Tensor, handle: Handle) -> Tensor:
        """Returns [T, D]: the experts' outputs y_MD (unweighted, in the order of ``Received``) on
        their own ranks again, weighted and summed in float32 in the order of k.
        """
        ...


Dispatcher = LocalDispatcher | Exchange
