"""The clock of a dispatcher: each second belongs to one phase."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lockstep.kernels.reference.sublayers import LocalExperts, Residual
from lockstep.moe.balance.placement import contiguous
from lockstep.moe.clock import DeviceClock, HostClock, PhaseClock
from lockstep.moe.dispatch.all_to_all import AllToAllExchange
from lockstep.moe.dispatch.dispatcher import Dispatcher, Received, RoutedExperts
from lockstep.moe.dispatch.exchange import ExchangeDispatcher, Handle
from lockstep.moe.dispatch.local import LocalDispatcher
from lockstep.parallel.collectives import Collectives

CPU = torch.device("cpu")
ALONE = Collectives("alone", 0, 1, None, 1.0, CPU)


class Layer:
    """A layer with its exchange, on a clock that the test moves: 1 s to dispatch, 2 to receive, 4
    for experts, 1 to send back, 4 to combine; 100 for shared experts, 1000 for attention.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.clock = HostClock(lambda: self.now)
        self.routed = RoutedExperts(1, self.choose, self.compute, self.sublayer)

    def run(self, dispatcher: Dispatcher, layer: int) -> Tensor:
        _, routed_TD, _ = dispatcher.run(layer, self.routed, (torch.ones(3, 2), None), self.shared)
        self.now += 1000
        return routed_TD

    def choose(self, residual: Residual) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return residual[0], residual[0], torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)

    def compute(self, received: Received, counts_S: Tensor) -> Tensor:
        self.now += 4
        return received.x_ND[received.rows_M]

    def sublayer(self, residual: Residual, local: LocalExperts) -> tuple[Tensor, Tensor, Tensor]:
        self.now += 4
        return residual[0], residual[0], local.rows_M

    def shared(self, x_TD: Tensor) -> None:
        self.now += 100


class Slow(AllToAllExchange):
    """An exchange that moves the clock of its layer."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(contiguous(1, 2, 1), ALONE, CPU)
        self.layer = layer

    def dispatch(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, layer: int) -> Handle:
        self.layer.now += 1
        return super().dispatch(x_TD, ids_TK, weights_TK, layer)

    def receive(self, handle: Handle) -> Received:
        self.layer.now += 2
        return super().receive(handle)

    def send_back(self, y_MD: Tensor, handle: Handle) -> None:
        self.layer.now += 1
        super().send_back(y_MD, handle)

    def combine(self, handle: Handle) -> Tensor:
        self.layer.now += 4
        return super().combine(handle)


def test_the_host_clock_splits_a_layer() -> None:
    layer = Layer()
    dispatcher = ExchangeDispatcher(Slow(layer), CPU, layer.clock)
    for layers in (1, 2):
        dispatcher.begin_step(3, 4)
        for _ in range(layers):
            assert layer.run(dispatcher, 0).shape == (3, 2)
    assert layer.clock.take() == [9.0, 12.0, 15.0], "no shared experts, no attention"
    assert layer.clock.take() == [0.0, 0.0, 0.0]


def test_all_of_a_local_layer_is_the_time_of_its_experts() -> None:
    layer = Layer()
    dispatcher = LocalDispatcher(contiguous(2, 3, 1), CPU, layer.clock)
    dispatcher.begin_step(3, 3)
    for number in range(2):
        assert layer.run(dispatcher, number).tolist() == [0, 1, 2]
    assert layer.clock.take() == [0.0, 8.0, 0.0]


class Event:
    """A CUDA event on a device whose time the test moves."""

    def __init__(self, device: dict[str, Any]) -> None:
        self._device = device
        self.at = 0.0

    def record(self) -> None:
        self.at = self._device["now"]
        self._device["recorded"] += 1

    def query(self) -> bool:
        return bool(self._device["idle"])

    def elapsed_time(self, end: Event) -> float:
        return 1000 * (end.at - self.at)


def one_layer(clock: PhaseClock, device: dict[str, Any]) -> None:
    clock.begin_step()
    clock.mark()
    for phase, seconds in enumerate((1.0, 2.0, 4.0)):
        device["now"] += seconds
        clock.lap(phase)


def test_the_device_clock_measures_one_step_and_never_waits() -> None:
    device: dict[str, Any] = {"now": 0.0, "idle": True, "recorded": 0}
    clock = DeviceClock(lambda: Event(device))
    for _ in range(64):
        one_layer(clock, device)
    assert device["recorded"] == 4, "the first step alone"
    assert clock.take() == [64.0, 128.0, 256.0], "its seconds times the steps"
    one_layer(clock, device)
    device["idle"] = False
    assert clock.take() == [0.0, 0.0, 0.0], "the device has not got there"
    device["idle"] = True
    assert clock.take() == [1.0, 2.0, 4.0]
