"""An MoE layer with given tokens, choices and weights: what dispatchers are compared by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lockstep.kernels.cpu.experts import experts, weighted_sum
from lockstep.kernels.reference.sublayers import Here
from lockstep.moe.balance.placement import contiguous
from lockstep.moe.dispatch.all_gather import AllGatherDispatcher
from lockstep.moe.dispatch.all_to_all import AllToAllDispatcher
from lockstep.moe.dispatch.local import LocalDispatcher
from lockstep.parallel.collectives import Collectives

Kind = Literal["local", "all_gather", "all_to_all"]

HIDDEN, WIDTH, LAYERS = 32, 24, 2
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """``tokens``: how many each rank has. ``only``: an expert that every token's first choice is,
    None for random choices.
    """

    name: str
    num_experts: int
    top_k: int
    tokens: tuple[int, ...]
    capacity: int
    only: int | None = None
    dtype: torch.dtype = torch.float32

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
    placement = contiguous(LAYERS, case.num_experts, size)
    start = sum(case.tokens[:rank]) if size > 1 else 0
    stop = start + case.tokens[rank] if size > 1 else sum(case.tokens)
    x, ids, weights = (part[start:stop] for part in case.inputs())
    w13, w2 = case.weights(placement.experts_of(rank, 0))
    outputs = []
    if kind == "local":

        def compute(here: Here) -> Tensor:
            y = experts(x, here.rows_M, here.slots_L[ids.flatten()], w13, w2, here.counts_S)
            return weighted_sum(y.view(*ids.shape, HIDDEN), weights)

        local = LocalDispatcher(placement, CPU)
        local.begin_step(len(x), len(x))
        return [local.run(layer, (len(x), case.top_k), compute) for layer in range(LAYERS)], local.counts_LS
    dispatcher = (AllGatherDispatcher if kind == "all_gather" else AllToAllDispatcher)(
        placement, collectives, CPU
    )
    dispatcher.begin_step(len(x), case.capacity if size > 1 else len(x))
    for layer in range(LAYERS):
        handle = dispatcher.dispatch(x, ids, weights, layer)
        received = dispatcher.receive(handle)
        y = experts(received.x_ND, received.rows_M, received.slots_M, w13, w2, dispatcher.counts_LS[layer])
        outputs.append(dispatcher.combine(y, handle))
    return outputs, dispatcher.counts_LS


def run_cases(
    collectives: Collectives, cases: list[Case], kinds: tuple[Kind, ...]
) -> list[list[tuple[list[Tensor], Tensor]]]:
    """``run_case`` for every case and kind."""
    return [[run_case(case, kind, collectives) for kind in kinds] for case in cases]
