"""Steps of the balancer: each changes one slot, or swaps two, and takes load from a layer's most
loaded rank.

All layers are searched at once, each from its most loaded rank. Suffixes: L layers, W ranks, S
slots per rank, E experts, P = W S slots, K candidate ranks, Q slots whose expert may leave them, C
slots of candidate ranks.
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
# The worth of a step by the experts that ranks receive more because of it: 0, 1, 2, -2, -1, so that
# each index is such a number. One that comes home or moves on costs nothing more: three ranks may
# pass experts on in a circle, for three.
_WORTH = np.float32(1.4) ** -np.array([0, 1, 2, -2, -1], np.float32)
# Less is a step worth that takes experts from another node.
_FAR = np.float32(1.05**-0.5)
# A step counts by the load above the target that it takes away; beyond the target, this much.
_BEYOND = 0.001


@dataclass(frozen=True)
class SlotSteps:
    """One step for each of some layers: ``slots`` get ``experts``, [L, 2]; the second slot is -1
    where only one changes. ``received``: experts that ranks receive more because of it, against
    the placement at first. ``value``: how far maxima fall for them, 0 or less where no step is
    worth taking.
    """

    slots: Ints
    experts: Ints
    received: Ints
    value: NDArray[np.floating[Any]]


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
        columns = zip(
            *((steps.slots, steps.experts, steps.received, steps.value) for steps in found), strict=True
        )
        return SlotSteps(*(np.stack(column)[which, self._each] for column in columns))

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
        slot, rank = self._slots_LQ[self._each, place], self._ranks_LQ[self._each, place]
        received = self._foreign(rank, expert) - self._foreign(rank, self._experts_LQ[self._each, place])
        return self._single(slot, expert, received, possible.astype(np.float64))

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

    def _foreign(self, ranks: Ints, experts: Ints) -> NDArray[np.int8]:
        """1 where a rank would receive an expert of its layer, 0 where it had it at first."""
        layers = self._layers.reshape(-1, *[1] * (max(ranks.ndim, experts.ndim) - 1))
        return (~self._state.had_LWE[layers, ranks, experts]).view(np.int8)

    def _value(self, score: NDArray[np.float32]) -> NDArray[np.float32]:
        """The worth of lowering maxima to ``score`` [L, _, _], whatever ranks receive."""
        gain = self.maximum.astype(np.float32)[:, None, None] - score
        above = (self.maximum - self._target).astype(np.float32)[:, None, None]
        return np.asarray(np.minimum(gain, above) + _BEYOND * gain)

    def _swaps(self) -> SlotSteps:
        """Exchanges a slot of the most loaded rank for one of a colder rank; C: slots of those."""
        state, each, hot_L1 = self._state, self._each, self._hot[:, None]
        size = state.num_slots
        num = max(1, min(state.num_ranks - 1, _CANDIDATES // size**2))
        cold_LK = np.argpartition(self._ranks_LW, num - 1, axis=1)[:, :num]
        slots_LC = (cold_LK[:, :, None] * size + np.arange(size)).reshape(len(each), -1)
        cold_LC = slots_LC // size
        mine_LS, their_LC = self._at(self._experts_LP, self._hot_LS), self._at(self._experts_LP, slots_LC)
        shares_LS = self._at(self._shares_LP, self._hot_LS).astype(np.float32)
        moved_LSC = shares_LS[:, :, None] - self._at(self._shares_LP, slots_LC).astype(np.float32)[:, None]
        loads_LC = self._at(self._ranks_LW, cold_LC).astype(np.float32)
        maximum_L = self.maximum.astype(np.float32)
        score_LSC = np.maximum(maximum_L[:, None, None] - moved_LSC, loads_LC[:, None] + moved_LSC)
        barred_LSK = state.holds_LWE[self._layers[:, None, None], cold_LK[:, None], mine_LS[:, :, None]]
        barred_LC = state.holds_LWE[self._layers[:, None], hot_L1, their_LC]
        far_LC = self._node_W[cold_LC] != self._node_W[self._hot][:, None]
        if self._within:
            barred_LC = barred_LC | far_LC
        mine_LSK = self._foreign(cold_LK[:, None], mine_LS[:, :, None])
        mine_LSK = mine_LSK - self._foreign(hot_L1, mine_LS)[:, :, None]
        theirs_LC = self._foreign(hot_L1, their_LC) - self._foreign(cold_LC, their_LC)
        worth_LSK = np.where(barred_LSK, np.float32(0), _WORTH[mine_LSK])
        worth_LC = np.where(barred_LC, np.float32(0), _WORTH[theirs_LC])
        value_LSC = self._value(score_LSC) * np.repeat(worth_LSK, size, axis=2)
        value_LSC *= (worth_LC * np.where(far_LC, _FAR, np.float32(1.0)))[:, None]
        best = value_LSC.reshape(len(each), -1).argmax(axis=1)
        mine, their = np.unravel_index(best, value_LSC.shape[1:])
        return SlotSteps(
            np.stack([slots_LC[each, their], self._hot_LS[each, mine]], axis=1),
            np.stack([mine_LS[each, mine], their_LC[each, their]], axis=1),
            (mine_LSK[each, mine, their // size] + theirs_LC[each, their]).astype(np.int64),
            value_LSC[each, mine, their],
        )

    def _replicas_of_the_hot(self) -> SlotSteps:
        """Gives an expert of the most loaded rank a further replica elsewhere."""
        state, each = self._state, self._each
        mine_LS = self._at(self._experts_LP, self._hot_LS)
        shares_LS = self._at(self._shares_LP, self._hot_LS)
        new_LS = self._at(self._loads_LE, mine_LS)
        new_LS = new_LS / (self._at(self._replicas_LE, mine_LS) + 1)
        kept_LS = self.maximum[:, None] - shares_LS + new_LS
        score_LSQ = np.maximum(kept_LS[:, :, None], self._rests_LQ[:, None] + new_LS[:, :, None])
        score_LSQ = np.maximum(score_LSQ, self._others_LQ[:, None])
        barred_LSQ = state.holds_LWE[
            self._layers[:, None, None], self._ranks_LQ[:, None], mine_LS[:, :, None]
        ]
        barred_LSQ = barred_LSQ | ~self._free_LQ[:, None] | (mine_LS == EMPTY)[:, :, None]
        far_LQ = self._node_W[self._ranks_LQ] != self._node_W[self._hot][:, None]
        if self._within:
            barred_LSQ = barred_LSQ | far_LQ[:, None]
        received_LSQ = self._foreign(self._ranks_LQ[:, None], mine_LS[:, :, None])
        received_LSQ = received_LSQ - self._foreign(self._ranks_LQ, self._experts_LQ)[:, None]
        worth_LQ = np.where(far_LQ, _FAR, np.float32(1.0))
        value_LSQ = self._value(score_LSQ) * _WORTH[received_LSQ] * worth_LQ[:, None]
        value_LSQ[barred_LSQ] = -np.inf
        best = value_LSQ.reshape(len(each), -1).argmax(axis=1)
        mine, place = np.unravel_index(best, barred_LSQ.shape[1:])
        slot, received = self._slots_LQ[each, place], received_LSQ[each, mine, place]
        return self._single(slot, mine_LS[each, mine], received, value_LSQ[each, mine, place])

    def _near_LQ(self, expert: Ints) -> NDArray[np.bool_]:
        """Whether an expert of each layer has a slot on the node of each slot that may change."""
        holds_LW = self._state.holds_LWE[self._layers, :, expert]
        nodes_LN = np.zeros((len(expert), int(self._node_W.max()) + 1), np.bool_)
        np.logical_or.at(nodes_LN, (self._each[:, None], self._node_W[None]), holds_LW)
        return np.asarray(self._at(nodes_LN, self._node_W[self._ranks_LQ]))

    def _single(
        self, slots: Ints, experts: Ints, received: NDArray[np.int8], value: NDArray[np.floating[Any]]
    ) -> SlotSteps:
        none = np.full(len(slots), EMPTY)
        return SlotSteps(
            np.stack([slots, none], axis=1),
            np.stack([experts, none], axis=1),
            received.astype(np.int64),
            value,
        )
