"""Greedy tokens over FP8 pages, as far as they are certain, and what a rank does to show that its
layout does not change them.

Keys that differ in the last bit of float32 may be rounded to eight bits one step apart. A few in a
million are; they move hidden states and logits by about 1e-4 of their size. Tokens count as certain
up to the first position where that could change a choice.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lockstep.kernels.reference.column import Reference
from lockstep.kernels.reference.sublayers import GateWeights
from lockstep.moe.layer import MoELayer
from lockstep.parallel.collectives import Collectives

from ..models.local_model import Stepper, load_local
from .greedy_prompts import load_prompts
from .hand_plans import Driver, Request, build_executor

NUM_NEW = 24
LOGIT_MARGIN, ROUTER_NOISE, ROUTER_DRAWS = 5e-3, 3e-4, 8
NUM_STEPS = 60


def prompts_of(family: str) -> list[list[int]]:
    return [entry.prompt for entry in load_prompts(family)]


def certain(path: Path, family: str) -> list[list[int]]:
    """Tokens that every prompt of the family gets alone, up to the first close choice."""
    model = load_local(path, torch.float32)
    close: list[Tensor] = []
    for layer in [module for module in model.modules() if isinstance(module, MoELayer)]:
        layer.register_forward_hook(
            lambda layer, inputs, _: close.append(
                turns(model.ops, layer.gate.weights, model.ops.add_norm(*inputs, layer.norm)[1])
            )
        )
    found = []
    for prompt in prompts_of(family):
        tokens = Driver(build_executor(path, kv_format="fp8"), [Request(prompt, NUM_NEW)]).run()[0]
        close.clear()
        logits_TV = Stepper(model, torch.uint8).step({0: prompt + tokens[:-1]})[0][len(prompt) - 1 :]
        top_T2 = logits_TV.topk(2).values
        close_T = torch.stack(close).any(0).cumsum(0)[len(prompt) - 1 :] > 0
        close_T |= top_T2[:, 0] - top_T2[:, 1] < LOGIT_MARGIN
        found.append(tokens[: int(close_T.int().argmax()) if close_T.any() else None])
    return found


def turns(ops: Reference, gate: GateWeights, x_TD: Tensor) -> Tensor:
    """[T] whether a little noise on its input makes the gate choose other experts."""
    generator = torch.Generator().manual_seed(0)
    size_T1 = x_TD.std(-1, keepdim=True)
    noisy = (
        x_TD + ROUTER_NOISE * size_T1 * torch.randn(x_TD.shape, generator=generator)
        for _ in range(ROUTER_DRAWS)
    )
    ids_TK, *chosen = (
        ops.gate(x, gate.weight, gate.bias, gate.routing)[0].sort(-1).values for x in (x_TD, *noisy)
    )
    return torch.stack([(ids != ids_TK).any(-1) for ids in chosen]).any(0)


def continue_over_fp8(
    collectives: Collectives, paths: dict[str, Path], dispatch: str, microbatches: int = 1
) -> dict[str, list[list[int]]]:
    """The tokens of this rank's share of every family's prompts: half of them start whole, the
    others one by one in chunks while the first ones decode.
    """
    found = {}
    for family, path in paths.items():
        mine = prompts_of(family)[collectives.index :: collectives.size]
        requests = [
            Request(prompt, NUM_NEW, start=i, chunk=9 + i) if i % 2 else Request(prompt, NUM_NEW)
            for i, prompt in enumerate(mine)
        ]
        executor = build_executor(path, collectives, dispatch, kv_format="fp8")
        driver = Driver(executor, requests, lambda step: 1280, microbatches=microbatches)
        found[family] = driver.run(NUM_STEPS)
    return found
