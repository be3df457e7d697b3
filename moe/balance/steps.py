"""Steps of the balancer: each changes one slot, or swaps two, and takes load from a layer's most
loaded rank.

All layers are searched at once, each from its most loaded rank. Suffixes: L layers, W ranks, S
slots per rank, E experts, P = W S slots, K candidate ranks, Q slots whose expert may leave them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .layers import Floats, Ints, Layers
from .placement import EMPTY

# Candidates of a swap, slot by slot: the coldest ranks, as many as keep a layer near this number.
_CANDIDATES = 600
# The cost of receiving an expert from another node, in experts received within the node.
_FAR = 1.05
# A step counts by the load above the target that it takes away; beyond the target, this much.
_BEYOND = 0.001


@dataclass(frozen=True)
class SlotSteps:
    """One step for each of some layers: ``slots`` get ``experts``, [L, 2]; the second slot is -1
    where only one changes. ``received``: experts that ranks receive. ``value``: how far maxima
    fall per expert received, 0 or less where no step is worth taking.
    """

    slots: Ints
    experts: Ints
    received: Ints
    value: Floats


class Search:
    """The state of ``layers``, looked at once: from it the best step of each layer follows.

    node_W: the node of every rank. ``within_nodes``: no expert goes to a node that lacks it.
    """

    def __init__(
        self, state: Layers, layers: Ints, target_L: Floats, node_W: Ints, within_nodes: bool
    ) -> None:
        self._state, self._node_W, self._within = state, node_W, within_nodes
        self._each = np.arange(len(layers))
        self._experts_LP = state.experts_LP[layers]
        self._replicas_LE, self._loads_LE = state.replicas_LE[layers], state.loads_LE[layers]
        self._shares_LP = state.shares_LP(layers)
        self._layers = layers
        num_slots = state.num_slots
        self._ranks_LW = self._shares_LP.reshape(len(layers), -1, num_slots).sum(axis=2)
        self._hot = self._ranks_LW.argmax(axis=1)
        self.maximum = self._ranks_LW[self._each, self._hot]
        self._target = target_L
        self._hot_LS = self._hot[:, None] * num_slots + np.arange(num_slots)

    def best(self, *, replicas: bool) -> SlotSteps:
        """The most valuable step of each layer; without ``replicas`` only swaps are looked at."""
        if not replicas:
            return self._swaps()
        self._leaving()
        found = [self._swaps(), self._replicas_of_the_hot()]
        which = np.stack([steps.value for steps in found]).argmax(axis=0)
        return SlotSteps(
            np.stack([steps.slots for steps in found])[which, self._each],
            np.stack([steps.experts for steps in found])[which, self._each],
            np.stack([steps.received for steps in found])[which, self._each],
            np.stack([steps.value for steps in found])[which, self._each],
        )

    def split_largest(self) -> SlotSteps:
        """A further replica of the expert with the largest share, where one that can spare a
        replica has room for it. Maxima of ranks may rise by it; ``value`` is 1 where it is
        possible.
        """
        self._leaving()
        shares_LE = self._loads_LE / np.maximum(self._replicas_LE, 1)
        expert = shares_LE.argmax(axis=1)
        largest = shares_LE[self._each, expert]
        new = self._loads_LE[self._each, expert] / (self._replicas_LE[self._each, expert] + 1)
        replicas_LQ = self._at(self._replicas_LE, self._experts_LQ)
        left_LQ = self._at(self._loads_LE, self._experts_LQ) / np.maximum(replicas_LQ - 1, 1)
        score_LQ = np.maximum(self._rests_LQ + new[:, None], self._others_LQ)
        there_LQ = self._state.holds_LWE[self._layers[:, None], self._ranks_LQ, expert[:, None]]
        barred_LQ = there_LQ | ~self._free_LQ | (left_LQ >= largest[:, None])
        if self._within:
            barred_LQ |= ~self._near_LQ(expert)
        score_LQ = np.where(barred_LQ, np.inf, score_LQ)
        place = score_LQ.argmin(axis=1)
        possible = np.isfinite(score_LQ[self._each, place]) & (largest > self._target)
        return self._single(self._slots_LQ[self._each, place], expert, possible.astype(np.float64))

    def _leaving(self) -> None:
        """Slots whose expert may leave them, EMPTY ones among them, since its other replicas stay
        below the target: the load of their ranks without them, and the largest load that other
        ranks then have.
        """
        spare_LE = (self._replicas_LE >= 2) & (
            self._loads_LE <= (self._replicas_LE - 1) * self._target[:, None]
        )
        replicas_LP = self._at(self._replicas_LE, self._experts_LP)
        may_LP = self._at(spare_LE, self._experts_LP)
        many = max(1, int(may_LP.sum(axis=1).max(initial=0)))
        self._slots_LQ = np.argpartition(~may_LP, many - 1, axis=1)[:, :many]
        self._free_LQ = self._at(may_LP, self._slots_LQ)
        self._ranks_LQ = self._slots_LQ // self._state.num_slots
        self._experts_LQ = self._at(self._experts_LP, self._slots_LQ)
        ranks_LQ = self._at(self._ranks_LW, self._ranks_LQ)
        self._rests_LQ = ranks_LQ - self._at(self._shares_LP, self._slots_LQ)
        replicas_LQ = self._at(replicas_LP, self._slots_LQ)
        more_LQ = self._at(self._loads_LE, self._experts_LQ)
        more_LQ = more_LQ * (1 / np.maximum(replicas_LQ - 1, 1) - 1 / np.maximum(replicas_LQ, 1))
        experts_LQ = self._experts_LQ.astype(np.int16)
        twins_LQQ = (experts_LQ[:, :, None] == experts_LQ[:, None]) & (experts_LQ != EMPTY)[:, :, None]
        twins_LQQ[:, np.arange(many), np.arange(many)] = False
        others_LQ = np.where(twins_LQQ, ranks_LQ.astype(np.float32)[:, None], -np.float32(np.inf)).max(axis=2)
        self._others_LQ = others_LQ + more_LQ

    def _at(self, values: NDArray[Any], columns: Ints) -> NDArray[Any]:
        """Values of each layer at its columns."""
        return values[self._each[:, None], columns]

    def _value(self, score: Floats, cost: Floats | float) -> Floats:
        """The worth of lowering the maximum to ``score`` (by layer first) at that cost."""
        shape = (-1,) + (1,) * (score.ndim - 1)
        maximum = self.maximum.astype(score.dtype).reshape(shape)
        target = self._target.astype(score.dtype).reshape(shape)
        gain = maximum - score
        return np.asarray((np.minimum(gain, maximum - target) + _BEYOND * gain) / np.sqrt(cost))

    def _swaps(self) -> SlotSteps:
        """Exchanges a slot of the most loaded rank for one of a colder rank."""
        state, each = self._state, self._each
        size = state.num_slots
        num = max(1, min(state.num_ranks - 1, _CANDIDATES // size**2))
        cold_LK = np.argpartition(self._ranks_LW, num - 1, axis=1)[:, :num]
        slots_LKS = cold_LK[:, :, None] * size + np.arange(size)
        mine_LS = self._at(self._experts_LP, self._hot_LS)
        their_LKS = self._experts_LP[each[:, None, None], slots_LKS]
        shares_LS = self._at(self._shares_LP, self._hot_LS)
        theirs_LKS = self._shares_LP[each[:, None, None], slots_LKS].astype(np.float32)
        moved = shares_LS.astype(np.float32)[:, :, None, None] - theirs_LKS[:, None]
        cold_L1K1 = self._at(self._ranks_LW, cold_LK).astype(np.float32)[:, None, :, None]
        score = np.maximum(self.maximum.astype(np.float32)[:, None, None, None] - moved, cold_L1K1 + moved)
        barred_LSK = state.holds_LWE[self._layers[:, None, None], cold_LK[:, None], mine_LS[:, :, None]]
        barred_LKS = state.holds_LWE[self._layers[:, None, None], self._hot[:, None, None], their_LKS]
        far_LK = self._node_W[cold_LK] != self._node_W[self._hot][:, None]
        if self._within:
            barred_LKS = barred_LKS | far_LK[:, :, None]
        cost_LKS = (1.0 + (their_LKS != EMPTY)) * np.where(far_LK, _FAR, 1.0)[:, :, None]
        value = self._value(score, cost_LKS[:, None].astype(np.float32))
        value[barred_LSK[..., None] | barred_LKS[:, None]] = -np.inf
        value = value.reshape(len(each), -1)
        best = value.argmax(axis=1)
        mine, rank, their = np.unravel_index(best, (size, num, size))
        slots = np.stack([slots_LKS[each, rank, their], self._hot_LS[each, mine]], axis=1)
        experts = np.stack([mine_LS[each, mine], their_LKS[each, rank, their]], axis=1)
        return SlotSteps(slots, experts, (experts != EMPTY).sum(axis=1), value[each, best])

    def _replicas_of_the_hot(self) -> SlotSteps:
        """Gives an expert of the most loaded rank a further replica elsewhere."""
        state, each = self._state, self._each
        mine_LS = self._at(self._experts_LP, self._hot_LS)
        shares_LS = self._at(self._shares_LP, self._hot_LS)
        new_LS = self._at(self._loads_LE, mine_LS)
        new_LS = new_LS / (self._at(self._replicas_LE, mine_LS) + 1)
        kept_LS = self.maximum[:, None] - shares_LS + new_LS
        score = np.maximum(kept_LS[:, :, None], self._rests_LQ[:, None] + new_LS[:, :, None])
        score = np.maximum(score, self._others_LQ[:, None])
        barred = state.holds_LWE[self._layers[:, None, None], self._ranks_LQ[:, None], mine_LS[:, :, None]]
        barred = barred | ~self._free_LQ[:, None] | (mine_LS == EMPTY)[:, :, None]
        far_LQ = self._node_W[self._ranks_LQ] != self._node_W[self._hot][:, None]
        if self._within:
            barred = barred | far_LQ[:, None]
        value = self._value(score, np.where(far_LQ, _FAR, 1.0)[:, None])
        value = np.where(barred, -np.inf, value).reshape(len(each), -1)
        best = value.argmax(axis=1)
        mine, place = np.unravel_index(best, barred.shape[1:])
        return self._single(self._slots_LQ[each, place], mine_LS[each, mine], value[each, best])

    def _near_LQ(self, expert: Ints) -> NDArray[np.bool_]:
        """Whether an expert of each layer has a slot on the node of each slot that may change."""
        holds_LW = self._state.holds_LWE[self._layers, :, expert]
        nodes_LN = np.zeros((len(expert), int(self._node_W.max()) + 1), np.bool_)
        np.logical_or.at(nodes_LN, (self._each[:, None], self._node_W[None]), holds_LW)
        return np.asarray(self._at(nodes_LN, self._node_W[self._ranks_LQ]))

    def _single(self, slots: Ints, experts: Ints, value: Floats) -> SlotSteps:
        none = np.full(len(slots), EMPTY)
        return SlotSteps(
            np.stack([slots, none], axis=1),
            np.stack([experts, none], axis=1),
            np.ones(len(slots), np.int64),
            value,
        )
