"""Layers under change: the experts in their slots, and the loads that follow.

Loads are in units of the mean over ranks, so every layer's mean is 1. A replica takes an equal
share of its expert's load.

Suffixes: L layers, W ranks, S slots per rank, P = W S slots, E experts; arrays over E have one more
column, which stands for an empty slot (``EMPTY`` indexes it).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .placement import EMPTY

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_ALWAYS = 1 << 20  # replicas of an empty slot's "expert": it may always leave


class Layers:
    """experts_LP: changed by ``put``. holds_LWE: whether a rank has a slot of an expert; had_LWE:
    whether it had one at first, true of an empty slot's. Of several slots of an expert on one rank
    the first counts, the others are taken as empty.
    """

    def __init__(self, loads_LE: Floats, experts_LWS: NDArray[Any]) -> None:
        num_layers, self.num_ranks, self.num_slots = experts_LWS.shape
        self.num_experts = loads_LE.shape[1]
        means_L = loads_LE.sum(axis=1, keepdims=True) / self.num_ranks
        self.loads_LE = np.pad(loads_LE / np.where(means_L > 0, means_L, 1.0), ((0, 0), (0, 1)))
        self.experts_LP = (
            once(experts_LWS).astype(np.int64).reshape(num_layers, self.num_ranks * self.num_slots)
        )
        every = np.arange(num_layers)[:, None]
        self.replicas_LE = np.zeros(self.loads_LE.shape, np.int64)
        np.add.at(self.replicas_LE, (every, self.experts_LP), 1)
        self.replicas_LE[:, EMPTY] = _ALWAYS
        self.holds_LWE = np.zeros((num_layers, self.num_ranks, self.num_experts + 1), np.bool_)
        self.holds_LWE[every, np.arange(self.experts_LP.shape[1]) // self.num_slots, self.experts_LP] = True
        self.had_LWE = self.holds_LWE.copy()
        self.holds_LWE[:, :, EMPTY], self.had_LWE[:, :, EMPTY] = False, True

    def shares_LE(self, layers: Ints) -> Floats:
        """The load of one replica of every expert."""
        return np.asarray(self.loads_LE[layers] / np.maximum(self.replicas_LE[layers], 1))

    def shares_LP(self, layers: Ints) -> Floats:
        """The load of every slot."""
        return np.take_along_axis(self.shares_LE(layers), self._columns(layers), axis=1)

    def rank_loads_LW(self, layers: Ints) -> Floats:
        shares_LP = self.shares_LP(layers)
        return np.asarray(shares_LP.reshape(len(layers), self.num_ranks, self.num_slots).sum(axis=2))

    def level_L(self) -> Floats:
        """The least that the largest share of an expert can be, whatever has replicas: the smallest
        level of which the experts' loads take no more parts than there are slots. At least the
        mean.
        """
        low_L = np.zeros(len(self.loads_LE))
        high_L = self.loads_LE.max(axis=1, initial=0.0) + 1e-9
        for _ in range(24):
            middle_L = (low_L + high_L) / 2
            parts_L = np.ceil(self.loads_LE / np.maximum(middle_L, 1e-9)[:, None]).clip(1).sum(axis=1) - 1
            fits_L = parts_L <= self.experts_LP.shape[1]
            low_L, high_L = np.where(fits_L, low_L, middle_L), np.where(fits_L, middle_L, high_L)
        return np.asarray(np.maximum(high_L, 1.0), np.float64)

    def put(self, layers: Ints, slots: Ints, experts: Ints) -> None:
        """Puts an expert (or EMPTY) into one slot of each layer given."""
        ranks, left = slots // self.num_slots, self.experts_LP[layers, slots]
        self.experts_LP[layers, slots] = experts
        self.replicas_LE[layers, left] -= 1
        self.replicas_LE[layers, experts] += 1
        self.replicas_LE[:, EMPTY] = _ALWAYS
        self.holds_LWE[layers, ranks, left] = False
        self.holds_LWE[layers, ranks, experts] = True
        self.holds_LWE[:, :, EMPTY] = False

    def _columns(self, layers: Ints) -> Ints:
        """The experts of all slots as columns of arrays over E."""
        experts_LP = self.experts_LP[layers]
        return np.where(experts_LP == EMPTY, self.num_experts, experts_LP)


def once(experts_LWS: NDArray[Any]) -> NDArray[Any]:
    """EMPTY for a slot whose expert a slot before it on the same rank has."""
    experts_LWS = experts_LWS.copy()
    for slot in range(1, experts_LWS.shape[2]):
        again_LW = (experts_LWS[:, :, :slot] == experts_LWS[:, :, slot : slot + 1]).any(axis=2)
        experts_LWS[:, :, slot][again_LW] = EMPTY
    return experts_LWS
