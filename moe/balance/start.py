"""The placement that a cluster starts with: contiguous, with replicas, or balanced by recorded
loads.

Suffixes: L MoE layers, W ranks, S slots per rank, E logical experts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .balance import Limits, balance
from .layers import Floats
from .placement import EMPTY, Placement, contiguous

_TARGET = 1.01  # moving costs nothing before the start


def starting_placement(
    num_layers: int,
    num_experts: int,
    num_ranks: int,
    redundant: int = 0,
    loads_LE: Floats | None = None,
    node_W: Sequence[int] | None = None,
) -> Placement:
    """``redundant`` slots of each layer hold replicas, of the experts that ``loads_LE`` asks for.

    An expert has at most one slot on a rank; slots that cannot be filled so stay empty.
    """
    num_slots = -(-(num_experts + redundant) // num_ranks)
    experts_LWS = np.full((num_layers, num_ranks, num_slots), EMPTY, np.int32)
    once = contiguous(num_layers, num_experts, num_ranks).experts_LWS
    experts_LWS[:, :, : once.shape[2]] = once
    _add_replicas(experts_LWS, num_experts, redundant)
    placement = Placement(experts_LWS, num_experts)
    if loads_LE is None:
        return placement
    nodes = None if node_W is None else tuple(node_W)
    return balance(loads_LE, placement, Limits(node_W=nodes, target=_TARGET)).placement


def placement_of(experts_i32: bytes, num_layers: int, num_experts: int, num_ranks: int) -> Placement:
    """The placement whose experts by layer, rank and slot were packed; contiguous if empty."""
    if not experts_i32:
        return contiguous(num_layers, num_experts, num_ranks)
    experts_LWS = np.frombuffer(experts_i32, np.int32).reshape(num_layers, num_ranks, -1)
    return Placement(experts_LWS, num_experts)


def read_loads(path: Path, num_layers: int, num_experts: int) -> Floats:
    """Tokens by MoE layer and expert, from a file: JSON (a list per layer, or a document with
    "expert_load", as /admin/cluster answers), or a routing trace (.npz with ``counts_SLE``).

    Raises ValueError naming the file when it holds something else, or another model's loads.
    """
    try:
        if path.suffix == ".npz":
            with np.load(path) as file:
                loads_LE = file["counts_SLE"].sum(axis=0, dtype=np.float64)
        else:
            document = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(document, dict):
                document = document["expert_load"]
            loads_LE = np.array(document, np.float64)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"experts.loads = {path}: holds no loads by layer and expert ({error})") from None
    if loads_LE.shape != (num_layers, num_experts):
        raise ValueError(
            f"experts.loads = {path}: loads of shape {list(loads_LE.shape)}; the model has {num_layers} MoE "
            f"layers of {num_experts} experts"
        )
    if not (np.isfinite(loads_LE).all() and (loads_LE >= 0).all()):
        raise ValueError(f"experts.loads = {path}: loads must be numbers of tokens, at least 0")
    return np.asarray(loads_LE, np.float64)


def _add_replicas(experts_LWS: NDArray[np.int32], num_experts: int, redundant: int) -> None:
    """Fills ``redundant`` free slots with experts at even distances, each on the next rank with
    most room that lacks it.
    """
    held = [set(slots[slots != EMPTY].tolist()) for slots in experts_LWS[0]] if len(experts_LWS) else []
    for number in range(redundant if held else 0):
        expert = (
            number * num_experts // redundant % num_experts
            if redundant < num_experts
            else number % num_experts
        )
        home = next(rank for rank, experts in enumerate(held) if expert in experts)
        # Half the ranks away, so that a replica is rarely on the node of its twin.
        ranks = [(home + len(held) // 2 + step) % len(held) for step in range(len(held))]
        free = [rank for rank in ranks if len(held[rank]) < experts_LWS.shape[2] and expert not in held[rank]]
        if free:
            rank = min(free, key=lambda rank: len(held[rank]))
            experts_LWS[:, rank, len(held[rank])] = expert
            held[rank].add(expert)
