"""Two microbatches over a transport that takes time: waits are hidden behind the other's work, and
the clock of phases counts only what is left of them.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lockstep.kernels.reference.sublayers import LocalExperts, Residual
from lockstep.moe.balance.placement import contiguous
from lockstep.moe.clock import HostClock
from lockstep.moe.dispatch.all_gather import AllGatherExchange
from lockstep.moe.dispatch.all_to_all import AllToAllExchange
from lockstep.moe.dispatch.dispatcher import Received, RoutedExperts
from lockstep.moe.dispatch.exchange import ExchangeDispatcher
from lockstep.parallel.collectives import Collectives, Pending
from lockstep.parallel.microbatches import Turns
from lockstep.parallel.tensor import TensorGroup

CPU = torch.device("cpu")
LAYERS, HIDDEN = 5, 2
DELAY = 2.0


class Transport(Collectives):
    """A group of one whose collectives complete ``DELAY`` after they were started, on a clock that
    the test moves.
    """

    def __init__(self) -> None:
        super().__init__("transport", 0, 1, None, 1.0, CPU)
        self.now = 0.0
        self._due: dict[int, float] = {}

    def all_to_all(
        self, rows: Tensor, send: list[int] | None, receive: list[int] | None, what: str
    ) -> Pending:
        return self._late(super().all_to_all(rows, send, receive, what))

    def all_gather(self, rows: Tensor, what: str, fill: int = 0) -> Pending:
        return self._late(super().all_gather(rows, what))

    def reduce_scatter(self, rows: Tensor, what: str) -> Pending:
        return self._late(super().reduce_scatter(rows, what))

    def all_reduce(self, rows: Tensor, what: str) -> Pending:
        return self._late(super().all_reduce(rows, what))

    def wait(self, pending: Pending) -> Tensor:
        self.now = max(self.now, self._due.pop(id(pending)))
        return super().wait(pending)

    def _late(self, pending: Pending) -> Pending:
        self._due[id(pending)] = self.now + DELAY
        return pending


class Stack:
    """Layers whose attention and experts take ``work`` for a step and half of it for a half."""

    def __init__(self, kind: type[AllToAllExchange] | type[AllGatherExchange], capacity: int) -> None:
        self.transport, self.turns = Transport(), Turns()
        self.clock = HostClock(lambda: self.transport.now)
        exchange = kind(contiguous(LAYERS, 2, 1), self.transport, CPU)
        self.dispatcher = ExchangeDispatcher(exchange, CPU, self.clock, self.turns.give)
        self.dispatcher.begin_step(4, capacity)

    def forward(self, num_tokens: int, work: float) -> Callable[[], Tensor]:
        def choose(residual: Residual) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            self.transport.now += work
            x_TD = residual[0]
            ids_TK = torch.arange(num_tokens)[:, None] % 2
            return x_TD, x_TD, ids_TK, torch.ones(num_tokens, 1)

        def compute(received: Received, counts_S: Tensor) -> Tensor:
            self.transport.now += work
            return 2 * received.x_ND[received.rows_M]

        def sublayer(residual: Residual, local: LocalExperts) -> tuple[Tensor, Tensor, Tensor]:
            raise AssertionError("experts are reached by an exchange")

        def run() -> Tensor:
            x_TD = torch.arange(float(num_tokens * HIDDEN)).view(num_tokens, HIDDEN)
            routed = RoutedExperts(1, choose, compute, sublayer)
            for layer in range(LAYERS):
                x_TD = self.dispatcher.run(layer, routed, (x_TD, None), lambda normed: None)[1]
            return x_TD

        return run


@pytest.mark.parametrize("kind", [AllToAllExchange, AllGatherExchange])
@pytest.mark.parametrize("capacity", [4, 8000])
def test_waits_are_hidden_where_a_half_computes_longer_than_the_delay(
    kind: type[AllToAllExchange] | type[AllGatherExchange], capacity: int
) -> None:
    whole = Stack(kind, capacity)
    expected = whole.forward(4, 6.0)()
    computed = LAYERS * 2 * 6.0
    added = whole.transport.now - computed
    assert added >= LAYERS * 2 * DELAY

    halved = Stack(kind, capacity)
    first, second = halved.turns.run(halved.forward(2, 3.0), halved.forward(2, 3.0))
    left = halved.transport.now - computed
    assert left <= 0.4 * added, f"{added - left:g} of {added:g} are hidden"
    assert torch.equal(first, expected[:2]) and torch.equal(second, expected[:2])

    dispatch, experts, combine = halved.clock.take()
    assert experts == LAYERS * 6.0 and dispatch + combine == pytest.approx(left)


@pytest.mark.parametrize("halved", [False, True])
def test_waits_of_a_tensor_group_are_hidden_too(halved: bool) -> None:
    """A sum, a run of the tokens, and all runs again, in every layer."""
    transport, turns = Transport(), Turns()
    group = TensorGroup(transport, turns.give)

    def forward(work: float) -> Tensor:
        residual: Residual = (torch.ones(2, HIDDEN), None)
        for _ in range(LAYERS):
            transport.now += work
            residual = group.complete((residual[0], torch.ones(2, HIDDEN)))
            transport.now += work
            own = group.scatter(residual)
            transport.now += work
            residual = group.gather(own, 2)
        return residual[0]

    if halved:
        first, second = turns.run(lambda: forward(3.0), lambda: forward(3.0))
        assert torch.equal(first, second)
    else:
        first = forward(6.0)
    assert first.tolist() == [[1.0 + LAYERS] * HIDDEN] * 2
    added = LAYERS * 3 * DELAY
    left = transport.now - LAYERS * 3 * 6.0
    assert left <= 0.4 * added if halved else left == added, f"{left:g} of {added:g} are waited for"
