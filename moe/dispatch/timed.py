"""Dispatchers that time their phases."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...kernels.reference.sublayers import Here
from ..balance.placement import Placement
from ..clock import _T, PhaseClock
from ..phases import COMBINE, DISPATCH, EXPERT
from .dispatcher import Exchange, Handle, Received
from .local import LocalDispatcher


class TimedLocal(LocalDispatcher):
    """A local dispatcher and the clock that runs beside it. A layer being one call, all of it is
    the experts' time.
    """

    def __init__(self, placement: Placement, device: torch.device, clock: PhaseClock) -> None:
        super().__init__(placement, device)
        self._clock = clock

    def begin_step(self, num_tokens: int, capacity: int) -> None:
        self._clock.begin_step()
        super().begin_step(num_tokens, capacity)

    def run(self, layer: int, shape: tuple[int, int], compute: Callable[[Here], _T]) -> _T:
        self._clock.mark()
        output = super().run(layer, shape, compute)
        self._clock.lap(EXPERT)
        return output


class TimedExchange:
    """An exchange and the clock that runs beside it. The experts' time is what lies between
    ``receive`` and ``combine``.
    """

    def __init__(self, inner: Exchange, clock: PhaseClock) -> None:
        self._inner = inner
        self._clock = clock

    @property
    def placement(self) -> Placement:
        return self._inner.placement

    @property
    def counts_LS(self) -> Tensor:
        return self._inner.counts_LS

    def begin_step(self, num_tokens: int, capacity: int) -> None:
        self._clock.begin_step()
        self._inner.begin_step(num_tokens, capacity)

    def dispatch(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, layer: int) -> Handle:
        self._clock.mark()
        handle = self._inner.dispatch(x_TD, ids_TK, weights_TK, layer)
        self._clock.lap(DISPATCH)
        return handle

    def receive(self, handle: Handle) -> Received:
        self._clock.mark()
        received = self._inner.receive(handle)
        self._clock.lap(DISPATCH)
        return received

    def combine(self, y_MD: Tensor, handle: Handle) -> Tensor:
        self._clock.lap(EXPERT)
        output = self._inner.combine(y_MD, handle)
        self._clock.lap(COMBINE)
        return output
