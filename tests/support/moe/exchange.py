"""An MoE layer with given tokens, choices and weights, by which dispatchers are compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lockstep.kernels.cpu.experts import experts, weighted_sum
from lockstep.kernels.reference.sublayers import LocalExperts, Residual
from lockstep.moe.balance.cover import cover
from lockstep.moe.balance.placement import EMPTY, Placement
from lockstep.moe.balance.start import starting_placement
from lockstep.moe.dispatch.dispatcher import Dispatcher, Received, RoutedExperts
from lockstep.moe.dispatch.within_capacity import TokenShape
from lockstep.parallel.collectives import Collectives

from .dispatchers import dispatcher_of, dispatcher_within_capacity

Kind = Literal["local", "all_gather", "all_to_all", "summing", "symmetric", "flashinfer", "deepep", "nccl_ep"]

HIDDEN, WIDTH, LAYERS = 32, 24, 2


@dataclass(frozen=True)
class Case:
    """``tokens``: how many each rank has. ``only``: the expert that is every token's first choice,
    None for random choices. ``redundant`` slots hold replicas. Nobody is at ``vacant`` positions;
    the experts of their slots have others.
    """

    name: str
    num_experts: int
    top_k: int
    tokens: tuple[int, ...]
    capacity: int
    only: int | None = None
    dtype: torch.dtype = torch.float32
    redundant: int = 0
    vacant: tuple[int, ...] = ()

    def placement(self, num_ranks: int) -> Placement:
        redundant = min(self.redundant, self.num_experts * (num_ranks - 1))
        placement = starting_placement(LAYERS, self.num_experts, num_ranks, redundant)
        if not self.vacant or num_ranks == 1:
            return placement
        loads_LE = np.ones((LAYERS, self.num_experts))
        covered_LWS = cover(placement, loads_LE, [slice(0, LAYERS)], self.vacant).experts_LWS.copy()
        covered_LWS[:, list(self.vacant)] = EMPTY
        return Placement(covered_LWS, self.num_experts)

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, D], ids [T, K] and weights [T, K] of all ranks' tokens, rank after rank."""
        generator = torch.Generator().manual_seed(len(self.name))
        total = sum(self.tokens)
        scores = torch.rand(total, self.num_experts, generator=generator)
        if self.only is not None:
            scores[:, self.only] += 1
        ids = scores.topk(self.top_k).indices
        return (
            torch.randn(total, HIDDEN, generator=generator).to(self.dtype),
            ids,
            torch.rand(total, self.top_k, generator=generator),
        )

    def weights(self, experts_of_rank: list[int]) -> tuple[Tensor, Tensor]:
        """w13 and w2 of the given experts, zero for -1."""
        generator = torch.Generator().manual_seed(7)
        w13 = (0.2 * torch.randn(self.num_experts, 2 * WIDTH, HIDDEN, generator=generator)).to(self.dtype)
        w2 = (0.2 * torch.randn(self.num_experts, HIDDEN, WIDTH, generator=generator)).to(self.dtype)
        index = torch.tensor(experts_of_rank)
        present = (index >= 0)[:, None, None]
        return w13[index] * present, w2[index] * present


def run_case(case: Case, kind: Kind, collectives: Collectives) -> tuple[list[Tensor], Tensor]:
    """The combined output of this rank's tokens in every layer, and its counts."""
    rank, size = collectives.index, collectives.size
    placement = case.placement(size)
    start = sum(case.tokens[:rank]) if size > 1 else 0
    stop = start + case.tokens[rank] if size > 1 else sum(case.tokens)
    x, ids, weights = (part[start:stop] for part in case.inputs())
    w13, w2 = case.weights(placement.experts_of(rank, 0))

    def choose(residual: Residual) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return x, x, ids, weights

    def compute(received: Received, counts_S: Tensor) -> Tensor:
        return experts(received.x_ND, received.rows_M, received.slots_M, w13, w2, counts_S)

    def sublayer(residual: Residual, local: LocalExperts) -> tuple[Tensor, Tensor, Tensor]:
        y = experts(x, local.rows_M, local.slots_L[ids.flatten()], w13, w2, local.counts_S)
        return x, x, weighted_sum(y.view(*ids.shape, HIDDEN), weights)

    routed = RoutedExperts(case.top_k, choose, compute, sublayer)
    if kind in ("symmetric", "flashinfer", "deepep", "nccl_ep"):
        shape = TokenShape((case.capacity,), case.top_k, HIDDEN, case.dtype)
        dispatcher: Dispatcher = dispatcher_within_capacity(kind, placement, collectives, shape)
    else:
        dispatcher = dispatcher_of(kind, placement, collectives)
    dispatcher.begin_step(len(x), case.capacity if size > 1 else len(x))
    outputs = [dispatcher.run(layer, routed, (x, None), lambda x: None)[1] for layer in range(LAYERS)]
    return outputs, dispatcher.counts_LS


def run_cases(
    collectives: Collectives, cases: list[Case], kinds: tuple[Kind, ...]
) -> list[list[tuple[list[Tensor], Tensor]]]:
    """``run_case`` for every case and kind. Empty at a position that is vacant in all of them."""
    [vacant] = {case.vacant for case in cases}
    if collectives.index in vacant:
        return []
    if vacant:
        collectives.build(1, vacant)
    return [[run_case(case, kind, collectives) for kind in kinds] for case in cases]
