"""Writes a routing trace of the trained model and reports its load: ``python -m
lockstep.recipes.demo.training.routing``.

The trace simulates a server with ``SLOTS`` running requests. Every step holds one token of each
running request and the prompts of new ones. A token's experts depend only on the tokens before it,
so one pass over a conversation gives the experts of all its steps. Most requests come from one
family, which changes every ``PHASE`` steps, as traffic does over a day.

S steps  L layers with experts  E experts  F families  T tokens  K experts per token
"""

from __future__ import annotations

import argparse
import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..cases.mixture import FAMILIES, draw_held_out
from ..cases.words import Dice
from ..files import HERE, MODEL
from .batches import Packer
from .export import read_network
from .network import Network

SEED = "routing"
STEPS = 8000
SLOTS = 48
PROMPT_TOKENS = 512  # most prompt tokens per step
PHASE = 1000
MAJORITY = 0.7
LONGEST = 1000
POOL = 200  # different conversations per family
TRACE = HERE / "routing_trace.npz"


@dataclass
class Routed:
    """A conversation and its tokens' experts, ids_TLK. The first ``prompt`` tokens arrive at once;
    ``done`` tokens have been computed.
    """

    family: int
    ids_TLK: np.ndarray[Any, np.dtype[np.uint8]]
    prompt: int
    done: int = 0


@torch.no_grad()
def routed(network: Network, packer: Packer, family: str) -> list[Routed]:
    """``POOL`` held-out conversations of a family and the experts of their tokens. The predictor's
    layer is left out.
    """
    dice = Dice(f"{SEED} {family}", held_out=True)
    found: list[Routed] = []
    while len(found) < POOL:
        batch = packer.pack([draw_held_out(dice, family, LONGEST) for _ in range(8)])
        network.states(batch)
        ids = [gate.last_ids_TK for gate in network.gates()[:-1]]
        ids_TLK = torch.stack([each for each in ids if each is not None], 1).to(torch.uint8)
        for part, weights in zip(
            ids_TLK.split(batch.lengths), batch.weights_T.split(batch.lengths), strict=True
        ):
            found.append(Routed(list(FAMILIES).index(family), part.numpy(), int(weights.argmax())))
    return found


def coming(pools: dict[str, list[Routed]], step: list[int]) -> Iterator[Routed]:
    """Endless requests; ``step`` holds the step at which the next one arrives."""
    dice = random.Random(SEED)
    families = list(pools)
    while True:
        major = families[step[0] // PHASE % len(families)]
        family = major if dice.random() < MAJORITY else dice.choice(families)
        yield replace(dice.choice(pools[family]))


def trace(network: Network, packer: Packer, steps: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Tokens by step, layer and expert, uint16 [S, L, E], and by step and family, uint16 [S, F]."""
    layers, experts = len(network.gates()) - 1, network.shape["n_routed_experts"]
    counts_SLE = np.zeros((steps, layers, experts), np.uint16)
    tokens_SF = np.zeros((steps, len(FAMILIES)), np.uint16)
    now = [0]
    requests = coming({family: routed(network, packer, family) for family in FAMILIES}, now)
    running: deque[Routed] = deque()
    for now[0] in range(steps):
        room = PROMPT_TOKENS
        while len(running) < SLOTS and room > 0:
            running.append(next(requests))
            room -= running[-1].prompt
        room = PROMPT_TOKENS
        for each in running:
            size = min(each.prompt - each.done, room) if each.done < each.prompt else 1
            room -= size if each.done < each.prompt else 0
            part = each.ids_TLK[each.done : each.done + size]
            each.done += size
            tokens_SF[now[0], each.family] += size
            for layer in range(layers):
                counts_E = np.bincount(part[:, layer].ravel(), minlength=experts)
                counts_SLE[now[0], layer] += counts_E.astype(np.uint16)
        running = deque(each for each in running if each.done < len(each.ids_TLK))
    return counts_SLE, tokens_SF


def report(counts_SLE: np.ndarray[Any, Any], tokens_SF: np.ndarray[Any, Any]) -> str:
    """Load of the experts over all steps, its skew, and the distance between the loads of
    families.
    """
    lines = [
        "layer  least load  most load  skew of a step (median)  skew of a family (median, most)"
        "  drift between families"
    ]
    major_S = tokens_SF.argmax(1)
    for layer in range(counts_SLE.shape[1]):
        counts_SE = counts_SLE[:, layer].astype(np.float64)
        total_E = counts_SE.sum(0)
        family_FE = np.stack([counts_SE[major_S == family].sum(0) for family in np.unique(major_S)])
        share_FE = family_FE / family_FE.sum(1, keepdims=True)
        skew_F = share_FE.max(1) * share_FE.shape[1]
        apart = [np.abs(a - b).sum() / 2 for index, a in enumerate(share_FE) for b in share_FE[:index]]
        step_S = counts_SE.max(1) / counts_SE.mean(1)
        least = total_E.min() / total_E.mean()
        most = total_E.max() / total_E.mean()
        lines.append(
            f"{layer + 1:5}  {least:10.2f}  {most:9.2f}  {np.median(step_S):23.2f}"
            f"  {np.median(skew_F):14.2f}, {skew_F.max():14.2f}  {np.mean(apart):22.2f}"
        )
    lines.append(
        "Loads and skews are multiples of the mean. Drift is the share of the load that moves to other"
        " experts between two families, on average."
    )
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Write the routing trace of the demo model and print the report."
    )
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=TRACE)
    args = parser.parse_args()
    torch.set_num_threads(1)
    counts_SLE, tokens_SF = trace(read_network(MODEL), Packer(MODEL), args.steps)
    np.savez_compressed(
        args.out, counts_SLE=counts_SLE, tokens_SF=tokens_SF, families=np.array(list(FAMILIES))
    )
    print(report(counts_SLE, tokens_SF))
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.2f} MB, {counts_SLE.nbytes / 1e6:.2f} MB of counts")


if __name__ == "__main__":
    main()
