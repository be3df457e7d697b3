"""Uneven expert load in a simulation: how much longer the fullest rank computes, with and without
balancing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...moe.balance.balance import Limits, balance, weighted_imbalance
from ...moe.balance.layers import Floats
from ...moe.balance.start import read_loads, starting_placement
from ..capacity.setup import Setup

_GENERATED = re.compile(r"lognormal:([a-z]+=[0-9.]+(?:,[a-z]+=[0-9.]+)*)?$")
_DEFAULTS = {"sigma": 1.0, "drift": 0.1, "seed": 0.0}


class ExpertLoadsError(ValueError):
    """Expert loads that cannot be simulated."""


@dataclass(frozen=True)
class ExpertBalance:
    """Maximum / mean expert load over the ranks of a stage, averaged over layers by their load:
    ``unbalanced`` as the experts are at the start, ``balanced`` after moves by which ranks receive
    ``received`` of all expert slots (``received_bytes`` on the rank that receives most).
    ``simulated`` is the one that step times use.
    """

    loads: str
    unbalanced: float
    balanced: float
    received: float
    received_bytes: int
    simulated: float


def balance_experts(asked: str, setup: Setup, *, balances: bool, folder: Path) -> ExpertBalance:
    """``asked``: a file as ``experts.loads`` takes it, on ranks that start with consecutive
    experts; or lognormal:sigma=1,drift=0.1,seed=0, on ranks balanced before the loads drifted.
    ``balances``: whether step times are those after balancing.

    Raises ExpertLoadsError when it is neither, or does not fit the model.
    """
    num_layers, num_experts = len(setup.shape.moe_layers), setup.shape.moe.num_experts
    before_LE, loads_LE = _loads(asked, num_layers, num_experts, folder)
    nodes = tuple(rank // setup.near_ranks for rank in range(setup.expert_ranks))
    shape = num_layers, num_experts, setup.expert_ranks
    before = starting_placement(*shape, setup.redundant, before_LE, nodes)
    after = balance(loads_LE, before, Limits(node_W=nodes))
    unbalanced, balanced = (weighted_imbalance(loads_LE, each) for each in (before, after.placement))
    expert_bytes = setup.expert_bytes
    most = np.bincount(after.moves.ranks, minlength=1).max(initial=0)
    return ExpertBalance(
        loads=asked,
        unbalanced=unbalanced,
        balanced=balanced,
        received=len(after.moves) / max(1, before.experts_LWS.size),
        received_bytes=int(most) * expert_bytes,
        simulated=balanced if balances else unbalanced,
    )


def _loads(asked: str, num_layers: int, num_experts: int, folder: Path) -> tuple[Floats | None, Floats]:
    """The loads by which experts are placed at the start, and those of the simulation."""
    if not asked.startswith("lognormal:"):
        try:
            return None, read_loads(folder / Path(asked).expanduser(), num_layers, num_experts)
        except ValueError as error:
            raise ExpertLoadsError(str(error).replace("experts.loads = ", "--experts ")) from None
    found = _GENERATED.match(asked)
    given = dict(part.split("=") for part in found[1].split(",")) if found and found[1] else {}
    if not found or set(given) - set(_DEFAULTS):
        raise ExpertLoadsError(
            f"--experts {asked}: allowed are a file, or lognormal: with sigma, drift and seed, as in "
            "lognormal:sigma=1,drift=0.1,seed=0"
        )
    try:
        values = _DEFAULTS | {name: float(value) for name, value in given.items()}
    except ValueError:
        raise ExpertLoadsError(f"--experts {asked}: sigma, drift and seed are numbers") from None
    if max(values["sigma"], values["drift"]) > 5:
        raise ExpertLoadsError(f"--experts {asked}: sigma and drift are at most 5")
    dice = np.random.default_rng(int(values["seed"]))
    before_LE = dice.lognormal(0, values["sigma"], (num_layers, num_experts))
    return before_LE, before_LE * dice.lognormal(0, values["drift"], before_LE.shape)
