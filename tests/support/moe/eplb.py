"""DeepSeek's published balancer, as its description tells it, to compare with: groups of experts
are packed to nodes, the hottest experts of a node get replicas, and replicas are packed to ranks.
"""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray

from lockstep.moe.balance.placement import Placement


def placed_anew(
    loads_LE: NDArray[np.float64], num_ranks: int, num_slots: int, nodes: int = 1, groups: int = 1
) -> Placement:
    """All experts placed anew in ``num_slots`` slots per rank. With groups that divide evenly over
    the nodes, a group stays on one node.
    """
    layers = [_layer(loads_E, num_ranks, num_slots, nodes, groups) for loads_E in loads_LE]
    return Placement(np.array(layers, np.int32), loads_LE.shape[1])


def _layer(
    loads_E: NDArray[np.float64], num_ranks: int, num_slots: int, nodes: int, groups: int
) -> list[list[int]]:
    if groups % nodes:
        nodes = groups = 1
    by_group = np.arange(len(loads_E)).reshape(groups, -1)
    ranks = []
    for held in _packed(loads_E[by_group].sum(axis=1), nodes):
        experts = by_group[held].ravel()
        counts = np.ones(len(experts), np.int64)
        for _ in range(num_slots * num_ranks // nodes - len(experts)):
            counts[(loads_E[experts] / counts).argmax()] += 1
        replicas = experts.repeat(counts)
        shares = (loads_E[experts] / counts).repeat(counts)
        ranks += [replicas[pack].tolist() for pack in _packed(shares, num_ranks // nodes)]
    return ranks


def _packed(weights: NDArray[np.float64], num_packs: int) -> list[list[int]]:
    """As many items in each pack; the heaviest first, each into the lightest pack with room."""
    room = len(weights) // num_packs
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    heap = [(0.0, pack) for pack in range(num_packs)]
    for item in np.argsort(-weights, kind="stable").tolist():
        load, pack = heapq.heappop(heap)
        packs[pack].append(item)
        if len(packs[pack]) < room:
            heapq.heappush(heap, (load + float(weights[item]), pack))
    return packs
