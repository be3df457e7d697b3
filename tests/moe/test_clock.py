"""The clock beside a dispatcher: which seconds belong to which phase."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lockstep.kernels.reference.sublayers import Here
from lockstep.moe.balance.placement import contiguous
from lockstep.moe.clock import DeviceClock, HostClock, PhaseClock
from lockstep.moe.dispatch.all_to_all import AllToAllDispatcher
from lockstep.moe.dispatch.dispatcher import Handle, Received
from lockstep.moe.dispatch.timed import TimedExchange, TimedLocal
from lockstep.parallel.collectives import Collectives

CPU = torch.device("cpu")
ALONE = Collectives("alone", 0, 1, None, 1.0, CPU)


class Slow(AllToAllDispatcher):
    """Takes 1 s to dispatch, 2 to receive, 5 to combine, by a clock that the test moves."""

    now = 0.0

    def dispatch(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, layer: int) -> Handle:
        self.now += 1
        return super().dispatch(x_TD, ids_TK, weights_TK, layer)

    def receive(self, handle: Handle) -> Received:
        self.now += 2
        return super().receive(handle)

    def combine(self, y_MD: Tensor, handle: Handle) -> Tensor:
        self.now += 5
        return super().combine(y_MD, handle)


def test_the_host_clock_splits_a_layer() -> None:
    slow = Slow(contiguous(1, 2, 1), ALONE, CPU)
    clock = HostClock(lambda: slow.now)
    timed = TimedExchange(slow, clock)
    for layers in (1, 2):
        timed.begin_step(3, 4)
        for _ in range(layers):
            handle = timed.dispatch(
                torch.ones(3, 2), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1), 0
            )
            slow.now += 100  # shared experts: nobody's
            received = timed.receive(handle)
            slow.now += 4  # experts
            assert timed.combine(received.x_ND[received.rows_M], handle).shape == (3, 2)
            slow.now += 1000  # attention of the next layer
    assert clock.take() == [9.0, 12.0, 15.0]
    assert clock.take() == [0.0, 0.0, 0.0]


def test_where_nothing_travels_all_of_a_layer_is_the_experts_time() -> None:
    now = 0.0
    clock = HostClock(lambda: now)
    timed = TimedLocal(contiguous(2, 3, 1), CPU, clock)

    def compute(here: Here) -> Tensor:
        nonlocal now
        now += 4
        return here.rows_M

    timed.begin_step(2, 2)
    for layer in range(2):
        assert timed.run(layer, (2, 3), compute).tolist() == [0, 0, 0, 1, 1, 1]
        now += 1000  # shared experts, and attention of the next layer
    assert clock.take() == [0.0, 8.0, 0.0]


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
