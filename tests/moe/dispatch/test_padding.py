"""Padding of a captured step: it goes to no expert, is counted nowhere, and changes no token."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lockstep.kernels.reference.experts import experts_reference
from lockstep.kernels.reference.sublayers import LocalExperts, Residual
from lockstep.moe.balance.placement import contiguous
from lockstep.moe.dispatch.dispatcher import Dispatcher, Received, RoutedExperts
from lockstep.moe.dispatch.within_capacity import TokenShape
from lockstep.parallel.collectives import Collectives
from support.moe.dispatchers import dispatcher_of, dispatcher_within_capacity

TOKENS, EXPERTS, HIDDEN, WIDTH, TOP_K = 5, 4, 8, 6, 2


def _dispatcher(kind: str) -> Dispatcher:
    placement = contiguous(1, EXPERTS, 1)
    if kind not in ("symmetric", "flashinfer", "deepep", "nccl_ep"):
        return dispatcher_of(kind, placement)
    alone = Collectives("alone", 0, 1, None, 1.0, torch.device("cpu"))
    shape = TokenShape((TOKENS,), TOP_K, HIDDEN, torch.float32)
    return dispatcher_within_capacity(kind, placement, alone, shape)


def test_a_captured_step_makes_its_own_places() -> None:
    """Memory of a recording is its own: it reads nothing that another step may free, and no other
    step reads what it made.
    """
    dispatcher = dispatcher_of("local", contiguous(1, EXPERTS, 1))
    seen: list[torch.Tensor] = []

    def sublayer(residual: Residual, local: LocalExperts) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        seen.append(local.rows_M)
        return residual[0], residual[0], residual[0]

    nothing: Any = None  # neither the gate nor the experts are called
    routed = RoutedExperts(TOP_K, nothing, nothing, sublayer)
    for real_1 in (None, None, torch.tensor([3]), torch.tensor([3]), None):
        dispatcher.begin_step(TOKENS, TOKENS, real_1)
        dispatcher.run(0, routed, (torch.zeros(TOKENS, HIDDEN), None), lambda x: None)
    assert [seen[0] is seen[1], seen[1] is seen[2], seen[2] is seen[3], seen[3] is seen[4]] == [
        True,
        False,
        False,
        False,
    ]


@pytest.mark.parametrize("kind", ["all_gather", "summing", "symmetric", "flashinfer", "deepep", "nccl_ep"])
@pytest.mark.parametrize("real", [0, 3, 5])
def test_padding_goes_nowhere(kind: str, real: int) -> None:
    generator = torch.Generator().manual_seed(1)
    x_TD = torch.randn(TOKENS, HIDDEN, generator=generator)
    ids_TK = torch.randn(TOKENS, EXPERTS, generator=generator).topk(TOP_K).indices
    weights_TK = torch.rand(TOKENS, TOP_K, generator=generator)
    w13 = torch.randn(EXPERTS, 2 * WIDTH, HIDDEN, generator=generator)
    w2 = torch.randn(EXPERTS, HIDDEN, WIDTH, generator=generator)

    def choose(residual: Residual) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        return x_TD, x_TD, ids_TK, weights_TK

    def compute(received: Received, counts_S: torch.Tensor) -> torch.Tensor:
        return experts_reference(received.x_ND, received.rows_M, received.slots_M, w13, w2, counts_S)

    def sublayer(residual: Residual, local: LocalExperts) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        raise AssertionError("not all experts are local")

    routed = RoutedExperts(TOP_K, choose, compute, sublayer)
    found = []
    for real_1 in (torch.tensor([real]), None):
        dispatcher = _dispatcher(kind)
        dispatcher.begin_step(TOKENS, TOKENS, real_1)
        found.append((dispatcher.run(0, routed, (x_TD, None), lambda x: None)[1], dispatcher.counts_LS))
    (padded_TD, counts), (whole_TD, _) = found
    assert torch.equal(padded_TD[:real], whole_TD[:real])
    assert not padded_TD[real:].any()
    assert counts[0].tolist() == torch.bincount(ids_TK[:real].flatten(), minlength=EXPERTS).tolist()
