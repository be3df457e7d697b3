"""Placement of experts: the map between logical experts and the ranks' expert slots. No torch here.

Suffixes: L MoE layers, W ranks, S slots per rank, E logical experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

EMPTY = -1


@dataclass(frozen=True, eq=False)
class Placement:
    """experts_LWS int32: the expert in every slot, ``EMPTY`` where there is none; an expert may
    have several slots.

    Every expert of [0, num_experts) has at least one slot in every layer (AssertionError
    otherwise).
    """

    experts_LWS: NDArray[np.int32]
    num_experts: int

    def __post_init__(self) -> None:
        most = max(int(self.experts_LWS.max(initial=EMPTY)), self.num_experts - 1)
        held_LE = np.zeros((self.num_layers, most + 2), np.bool_)  # and one for EMPTY
        held_LE[np.arange(self.num_layers)[:, None, None], self.experts_LWS] = True
        wrong_L = ~held_LE[:, : self.num_experts].all(axis=1) | held_LE[:, self.num_experts : -1].any(axis=1)
        for layer in np.flatnonzero(wrong_L):
            found = np.unique(self.experts_LWS[layer])
            missing = np.setdiff1d(np.arange(self.num_experts), found)
            assert not len(missing), f"layer {layer}: experts {missing.tolist()} have no slot"
            assert found.max(initial=EMPTY) < self.num_experts, (
                f"layer {layer}: expert {found.max()} of {self.num_experts}"
            )

    @property
    def num_layers(self) -> int:
        return int(self.experts_LWS.shape[0])

    @property
    def num_ranks(self) -> int:
        return int(self.experts_LWS.shape[1])

    @property
    def num_slots(self) -> int:
        """Slots per rank, occupied or not."""
        return int(self.experts_LWS.shape[2])

    @cached_property
    def homes_LE(self) -> NDArray[np.int64]:
        """The first place of every expert, as rank x num_slots + slot."""
        flat = self.experts_LWS.reshape(self.num_layers, self.num_ranks * self.num_slots)
        homes = np.empty((self.num_layers, self.num_experts), np.int64)
        for layer, experts in enumerate(flat):
            places = np.nonzero(experts != EMPTY)[0][::-1]
            homes[layer, experts[places]] = places
        return homes

    def ranges(self) -> NDArray[np.int32]:
        """The placement as ranges [n, 5]: (first layer, last layer, rank, first expert, last
        expert). Consecutive layers that are alike share a range. Slots, and how many an expert has,
        are left out.
        """
        found: list[tuple[int, ...]] = []
        changes = (self.experts_LWS[1:] != self.experts_LWS[:-1]).any(axis=(1, 2)).nonzero()[0] + 1
        for layers in np.split(np.arange(self.num_layers), changes):
            for rank, slots in enumerate(self.experts_LWS[layers[0]] if len(layers) else ()):
                experts = np.unique(slots[slots != EMPTY])
                parts = np.split(experts, (np.diff(experts) > 1).nonzero()[0] + 1)
                found += [(layers[0], layers[-1], rank, part[0], part[-1]) for part in parts if len(part)]
        return np.array(found, np.int32).reshape(-1, 5)

    def experts_of(self, rank: int, layer: int) -> list[int]:
        """The expert in each slot of ``rank``, ``EMPTY`` for a free slot."""
        return [int(expert) for expert in self.experts_LWS[layer, rank]]


def contiguous(num_layers: int, num_experts: int, num_ranks: int) -> Placement:
    """Consecutive experts on each rank; the ranks' numbers of experts differ by at most one."""
    num_slots = -(-num_experts // num_ranks)
    experts_LWS = np.full((num_layers, num_ranks, num_slots), EMPTY, np.int32)
    for rank, experts in enumerate(np.array_split(np.arange(num_experts), num_ranks)):
        experts_LWS[:, rank, : len(experts)] = experts
    return Placement(experts_LWS, num_experts)
