"""Layers under change: the experts in their slots, and the loads that follow.

Loads are in units of the mean over ranks, so every layer's mean is 1. A replica takes an equal
share of its expert's load.

Suffixes: L layers, W ranks, S slots per rank, P = W S slots, E experts; arrays over E have one more
column, ``num_experts``, which stands for the expert of an empty slot.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .placement import EMPTY

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

HELD, FOREIGN = 1, 2
"""Flags in ``Layers.bits_LWE``."""

_CHANGING = ("experts_LP", "replicas_LE", "shares_LE", "bits_LWE", "foreign_LP", "ranks_LW")
_ALWAYS = 1 << 20  # replicas of the expert that stands for empty slots: it may always leave
_LEVEL = 1e-7  # relative precision of ``level_L``


class Layers:
    """experts_LP, replicas_LE, shares_LE (the load of one replica of every expert) and ranks_LW
    (the load of every rank) are changed by ``put`` and ``swap``. bits_LWE uint8: HELD where a rank
    has a slot of an expert, FOREIGN where it had none at first; neither is set for empty slots.
    foreign_LP: 1 where the expert of a slot is foreign, else 0. If a rank has several slots of an
    expert, the first counts; the others are treated as empty.
    """

    def __init__(self, loads_LE: Floats, experts_LWS: NDArray[Any]) -> None:
        num_layers, self.num_ranks, self.num_slots = experts_LWS.shape
        self.num_experts = loads_LE.shape[1]
        means_L = loads_LE.sum(axis=1, keepdims=True) / self.num_ranks
        self.loads_LE = np.pad(loads_LE / np.where(means_L > 0, means_L, 1.0), ((0, 0), (0, 1)))
        experts_LP = once(experts_LWS).astype(np.int64).reshape(num_layers, self.num_ranks * self.num_slots)
        self.experts_LP = np.where(experts_LP == EMPTY, self.num_experts, experts_LP)
        every = np.arange(num_layers)[:, None]
        columns = (every * (self.num_experts + 1) + self.experts_LP).ravel()
        self.replicas_LE = np.bincount(columns, minlength=self.loads_LE.size).reshape(self.loads_LE.shape)
        self.replicas_LE[:, -1] = _ALWAYS
        self.shares_LE = self.loads_LE / np.maximum(self.replicas_LE, 1)
        self.bits_LWE = np.full((num_layers, self.num_ranks, self.num_experts + 1), FOREIGN, np.uint8)
        self.bits_LWE[every, np.arange(self.experts_LP.shape[1]) // self.num_slots, self.experts_LP] = HELD
        self.bits_LWE[:, :, -1] = 0
        self.foreign_LP = np.zeros(self.experts_LP.shape, np.float32)
        self.ranks_LW = self._sums_LW(self.shares_LE, self.experts_LP)

    def copy(self) -> Layers:
        """An independent copy."""
        found = copy.copy(self)
        for name in _CHANGING:
            setattr(found, name, getattr(self, name).copy())
        return found

    def reset(self, layers: Ints, earlier: Layers) -> None:
        """Restores ``layers`` from a copy."""
        for name in _CHANGING:
            getattr(self, name)[layers] = getattr(earlier, name)[layers]

    def placed_LWS(self) -> NDArray[np.int32]:
        """The expert in every slot, EMPTY where there is none."""
        experts_LP = np.where(self.experts_LP == self.num_experts, EMPTY, self.experts_LP)
        return experts_LP.astype(np.int32).reshape(-1, self.num_ranks, self.num_slots)

    def shares_LP(self, layers: Ints) -> Floats:
        """The load of every slot."""
        return np.asarray(at(self.shares_LE[layers], self.experts_LP[layers]))

    def maximum_L(self) -> Floats:
        """The largest load over ranks."""
        return np.asarray(self.ranks_LW.max(axis=1, initial=0.0), np.float64)

    def level_L(self) -> Floats:
        """A lower bound of the largest share of an expert, whichever experts have replicas: the
        smallest level at which the experts' loads, cut into parts of it, need no more parts than
        there are slots. At least the mean.
        """
        low_L = np.ones(len(self.loads_LE))
        high_L = np.maximum(self.loads_LE.max(axis=1, initial=0.0), 1.0)
        for _ in range(24):
            if (high_L - low_L).max(initial=0.0) < _LEVEL:
                break
            middle_L = (low_L + high_L) / 2
            parts_L = np.ceil(self.loads_LE / middle_L[:, None]).clip(1).sum(axis=1) - 1
            fits_L = parts_L <= self.experts_LP.shape[1]
            low_L = np.where(fits_L, low_L, middle_L)
            high_L = np.where(fits_L, middle_L, high_L)
        return np.asarray(high_L, np.float64)

    def received(self, layers: Ints, slots: Ints, experts: Ints) -> Ints:
        """Additional experts that ranks receive, relative to the first placement, if a slot of each
        layer gets an expert (or ``num_experts``).
        """
        comes = self.bits_LWE[layers, slots // self.num_slots, experts] >= FOREIGN
        return np.asarray(comes - self.foreign_LP[layers, slots], np.int64)

    def put(self, layers: Ints, slots: Ints, experts: Ints) -> None:
        """Puts an expert (or ``num_experts``) into one slot of each layer given."""
        left = self.experts_LP[layers, slots]
        self._set(layers, slots, experts)
        self.replicas_LE[layers, left] -= 1
        self.replicas_LE[layers, experts] += 1
        self.replicas_LE[layers, -1] = _ALWAYS
        for changed in (left, experts):
            replicas = np.maximum(self.replicas_LE[layers, changed], 1)
            self.shares_LE[layers, changed] = self.loads_LE[layers, changed] / replicas
        self.ranks_LW[layers] = self._sums_LW(self.shares_LE[layers], self.experts_LP[layers])

    def swap(self, layers: Ints, slots_2: Ints) -> None:
        """Exchanges the experts of two slots [2, n] of each layer given, on different ranks."""
        experts_2 = self.experts_LP[layers, slots_2]
        shares_2 = self.shares_LE[layers, experts_2]
        self.ranks_LW[layers, slots_2 // self.num_slots] += shares_2[::-1] - shares_2
        self._set(layers, slots_2, experts_2[::-1])

    def exchange(self, layers: Ints, slots: Ints, experts: Ints) -> None:
        """Puts experts into slots, one of each rank at most, that give up the same experts."""
        self._set(layers, slots, experts)
        layers = np.unique(layers)
        self.ranks_LW[layers] = self._sums_LW(self.shares_LE[layers], self.experts_LP[layers])

    def _sums_LW(self, shares_LE: Floats, experts_LP: Ints) -> Floats:
        """The load of every rank."""
        shares_LP = at(shares_LE, experts_LP)
        loads_LW = shares_LP[:, :: self.num_slots].copy()
        for slot in range(1, self.num_slots):
            loads_LW += shares_LP[:, slot :: self.num_slots]
        return np.asarray(loads_LW)

    def _set(self, layers: Ints, slots: Ints, experts: Ints) -> None:
        ranks = slots // self.num_slots
        self.bits_LWE[layers, ranks, self.experts_LP[layers, slots]] &= ~np.uint8(HELD)
        self.experts_LP[layers, slots] = experts
        bits = self.bits_LWE[layers, ranks, experts]
        self.foreign_LP[layers, slots] = bits >= FOREIGN
        self.bits_LWE[layers, ranks, experts] = np.where(experts < self.num_experts, bits | HELD, 0)


def at(values_LE: NDArray[Any], columns: Ints) -> NDArray[Any]:
    """Values of each layer at its columns [L, ...]."""
    (found,) = at_all((values_LE,), columns)
    return found


def at_all(arrays_LE: Sequence[NDArray[Any]], columns: Ints) -> list[NDArray[Any]]:
    """Values of several arrays of one shape, of each layer at its columns [L, ...]."""
    num_layers, num_columns = arrays_LE[0].shape
    first = np.arange(0, num_layers * num_columns, num_columns)
    indices = columns + first.reshape(-1, *[1] * (columns.ndim - 1))
    return [values_LE.ravel().take(indices) for values_LE in arrays_LE]


def once(experts_LWS: NDArray[Any]) -> NDArray[Any]:
    """The experts, with EMPTY for a slot whose expert an earlier slot of the same rank has."""
    experts_LWS = experts_LWS.copy()
    for slot in range(1, experts_LWS.shape[2]):
        again_LW = (experts_LWS[:, :, :slot] == experts_LWS[:, :, slot : slot + 1]).any(axis=2)
        experts_LWS[:, :, slot][again_LW] = EMPTY
    return experts_LWS
