"""The state of the cluster as /admin/cluster shows it."""

from __future__ import annotations

from array import array
from functools import lru_cache
from typing import Any

from ...protocol.cluster_state import ClusterState

# Loads and placement get a form that can be read; totals are for /metrics.
_RESHAPED = ("expert_i64", "expert_layers", "placement_i32", "ranks", "totals", "overlap", "overlap_choices")


def describe_cluster(cluster: ClusterState) -> dict[str, Any]:
    """The JSON document of a cluster state."""
    shown = {name: getattr(cluster, name) for name in cluster.__struct_fields__ if name not in _RESHAPED}
    shown["ranks"] = [
        {name: getattr(rank, name) for name in rank.__struct_fields__} for rank in cluster.ranks
    ]
    shown["overlap"] = {
        "mode": cluster.overlap,
        "steps": cluster.totals.overlapped,
        "last_step": cluster.totals.overlap,
        "choices": [
            {name: getattr(choice, name) for name in choice.__struct_fields__}
            for choice in cluster.overlap_choices
        ],
    }
    shown["moved_bytes"] = cluster.totals.moved_bytes
    shown["expert_load"] = _loads(cluster)
    shown["placement"] = _placement(cluster.placement_i32, len(cluster.ranks))
    return shown


def _loads(cluster: ClusterState) -> list[list[int]]:
    """Tokens by MoE layer and expert; empty where none were reported."""
    loads = array("q", cluster.expert_i64).tolist() if cluster.expert_layers else []
    width = len(loads) // cluster.expert_layers if cluster.expert_layers else 0
    return [loads[start : start + width] for start in range(0, len(loads), width)] if width else []


@lru_cache(maxsize=2)  # it hardly ever changes, and a page asks every second
def _placement(packed: bytes, num_ranks: int) -> list[dict[str, Any]]:
    """The ranges of experts on each rank, by range of MoE layers. Ranges include both ends."""
    numbers = array("i", packed).tolist()
    layers: dict[tuple[int, int], list[list[list[int]]]] = {}
    for first, last, rank, low, high in zip(*[iter(numbers)] * 5, strict=True):
        layers.setdefault((first, last), [[] for _ in range(num_ranks)])[rank].append([low, high])
    return [{"layers": list(span), "experts": experts} for span, experts in layers.items()]
