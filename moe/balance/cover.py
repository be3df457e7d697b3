"""A placement for ranks that go on without others: they take over experts that only those had.

Suffixes: L MoE layers, E logical experts, S slots per rank.
"""

from __future__ import annotations

from collections.abc import Sequence

from .balance import Limits, balance
from .layers import Floats
from .placement import Placement

_ANY_LOAD = 1e9  # a target that no layer exceeds: experts are covered, not balanced


def cover(
    placement: Placement, loads_LE: Floats, stages: Sequence[slice], vacant: Sequence[int]
) -> Placement:
    """The placement nearest to this one in which every expert has a slot beside those of ``vacant``
    ranks; these keep their experts until they come back. ``stages``: the layers of each.

    Raises ValueError where the other ranks have fewer slots than there are experts.
    """
    limits = Limits(dead=frozenset(vacant), max_received=0, target=_ANY_LOAD)
    experts_LWS = placement.experts_LWS.copy()
    for layers in stages:
        part = Placement(placement.experts_LWS[layers], placement.num_experts)
        experts_LWS[layers] = balance(loads_LE[layers], part, limits).placement.experts_LWS
    experts_LWS[:, list(vacant)] = placement.experts_LWS[:, list(vacant)]
    return Placement(experts_LWS, placement.num_experts)
