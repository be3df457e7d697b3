"""Dispatch between ranks: an exchange carries tokens to the ranks of their experts, and the outputs
back.

Suffixes: T own tokens, K choices per token, D hidden, N received tokens (padded ones included), M
pairs (token, choice) for the experts of this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ...kernels.reference.fp8 import Normed
from ...kernels.reference.sublayers import Residual
from ..balance.placement import EMPTY, Placement
from ..clock import PhaseClock, clock_for
from ..phases import COMBINE, DISPATCH, EXPERT
from .dispatcher import Received, RoutedExperts, padding_of, zero_counts


@dataclass(frozen=True)
class Handle:
    """An exchange under way, as its later steps need it. ``state`` belongs to the exchange.
    ``counting``: the numbers of tokens travel first, and ``forward`` has to follow.
    """

    weights_TK: Tensor
    layer: int
    state: Any = None
    counting: bool = False


class Exchange(Protocol):
    """A way for tokens to travel. Every rank makes the same calls in the same order."""

    @property
    def placement(self) -> Placement: ...

    def place(self, placement: Placement, layers: Sequence[int]) -> None:
        """As ``Dispatcher.place``."""
        ...

    def begin_step(self, num_tokens: int, capacity: int) -> None:
        """As ``Dispatcher.begin_step``."""
        ...

    def dispatch(self, normed: Normed, ids_TK: Tensor, weights_TK: Tensor, layer: int) -> Handle:
        """Starts sending the norm of tokens to their experts. ids_TK int64 logical experts, -1 for
        padding, of which a captured step has some; weights_TK float32.
        """
        ...

    def forward(self, handle: Handle) -> None:
        """Waits for the numbers of tokens, and starts sending the tokens themselves."""
        ...

    def receive(self, handle: Handle) -> Received:
        """Waits for the tokens of other ranks."""
        ...

    def send_back(self, y_MD: Tensor, handle: Handle) -> None:
        """Starts sending the experts' outputs y_MD (unweighted, in the order of ``Received``) to
        the ranks of their tokens.
        """
        ...

    def combine(self, handle: Handle) -> Tensor:
        """Waits for the outputs. Returns [T, D], weighted and summed in float32 in the order of
        k.
        """
        ...


class ExchangeDispatcher:
    """Runs the experts of a layer between the two ways of an exchange. ``give_turn`` is called
    before each wait: meanwhile another microbatch may compute.
    """

    def __init__(
        self,
        exchange: Exchange,
        device: torch.device,
        clock: PhaseClock | None = None,
        give_turn: Callable[[], None] = lambda: None,
    ) -> None:
        self.counts_LS = zero_counts(exchange.placement, device)
        self.clock = clock_for(device) if clock is None else clock
        self._exchange = exchange
        self._give_turn = give_turn
        self._padding_T1: Tensor | None = None

    @property
    def placement(self) -> Placement:
        return self._exchange.placement

    def place(self, placement: Placement, layers: Sequence[int]) -> None:
        self._exchange.place(placement, layers)

    def begin_step(self, num_tokens: int, capacity: int, real_1: Tensor | None = None) -> None:
        self.clock.begin_step()
        self._padding_T1 = padding_of(num_tokens, real_1)
        self._exchange.begin_step(num_tokens, capacity)

    def run(
        self, layer: int, routed: RoutedExperts, residual: Residual, shared: Callable[[Normed], Tensor | None]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        exchange, clock, give_turn = self._exchange, self.clock, self._give_turn
        x_TD, normed, ids_TK, weights_TK = routed.choose(residual)
        if self._padding_T1 is not None:
            ids_TK = ids_TK.masked_fill(self._padding_T1, EMPTY)
        clock.mark()
        handle = exchange.dispatch(normed, ids_TK, weights_TK, layer)
        clock.lap(DISPATCH)
        if handle.counting:
            give_turn()
            clock.mark()
            exchange.forward(handle)
            clock.lap(DISPATCH)
        shared_TD = shared(normed)
        give_turn()
        clock.mark()
        received = exchange.receive(handle)
        clock.lap(DISPATCH)
        y_MD = routed.compute(received, self.counts_LS[layer])
        clock.lap(EXPERT)
        exchange.send_back(y_MD, handle)
        clock.lap(COMBINE)
        give_turn()
        clock.mark()
        routed_TD = exchange.combine(handle)
        clock.lap(COMBINE)
        return x_TD, routed_TD, shared_TD
