"""Steps of the balancer: each changes one slot, or swaps two, and takes load from a layer's most
loaded rank.

All layers are searched at once, each from its most loaded rank. Suffixes: L layers, W ranks, S
slots per rank, E experts, P = W S slots, K candidate ranks, Q slots whose expert may leave them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .layers import HELD, Floats, Ints, Layers, at, at_all
from .placement import EMPTY

# Candidates of a swap, slot by slot: the coldest ranks, as many as keep a layer near this number.
_CANDIDATES = 600
# The worth of a step falls by this for every expert that ranks receive more because of it. One that
# comes home or moves on costs nothing more: three ranks may pass experts on in a circle, for three.
_RECEIVED = np.float32(1.4)
# The worth of a rank's receiving an expert, by its bits: none where it holds it already.
_COMING = np.array([1, 0, 1 / _RECEIVED, 0], np.float32)
# A step that takes experts from another node is worth less.
_FAR = np.float32(1.05**-0.5)
# The price of room below the target, for one mean load of it, at the greatest scarcity.
_PRICE = np.float32(3)
# A step counts by the load above the target that it removes; load below the target counts this
# much.
_BEYOND = np.float32(0.001)


@dataclass(frozen=True)
class SlotSteps:
    """One step for each of some layers: ``slots`` get ``experts``, [L, 2]; the second slot is -1
    where only one changes. ``value``: how far maxima fall for them, 0 or less where no step is
    worth taking.
    """

    slots: Ints
    experts: Ints
    value: NDArray[np.floating[Any]]


def nearness(node_W: Ints, within_nodes: bool) -> NDArray[np.float32]:
    """[W, W]: the weight of a move between two ranks. node_W: the node of every rank.
    ``within_nodes``: no expert goes to a node that lacks it.
    """
    far_WW = node_W != node_W[:, None]
    return np.where(far_WW, 0 if within_nodes else _FAR, np.float32(1))


def _least(loads_LW: Floats, num: int) -> Ints:
    """The ``num`` least loaded ranks of each layer. Keys are the loads' bits with the rank in the
    lowest ones: sorting these is three times as fast as ``argpartition``.
    """
    num_ranks = loads_LW.shape[1]
    if num == num_ranks:
        return np.tile(np.arange(num), (len(loads_LW), 1))
    mask = (1 << num_ranks.bit_length()) - 1
    keys_LW: Ints = np.ascontiguousarray(loads_LW).view(np.int64) & ~mask | np.arange(num_ranks)
    keys_LW.partition(num - 1, axis=1)
    return np.asarray(keys_LW[:, :num] & mask, np.int64)


def scarcity(ranks_LW: Floats, target_L: Floats) -> Floats:
    """Scarcity of room below the target: load above it / room below it, from 0 to 1."""
    above_LW = ranks_LW - target_L[:, None]
    above_L = above_LW.clip(0).sum(axis=1)
    room_L = (-above_LW).clip(0).sum(axis=1)
    return np.asarray(above_L / np.maximum(np.maximum(above_L, room_L), np.finfo(np.float64).tiny))


class Search:
    """A snapshot of ``layers`` in which to find the best step of each layer.

    scarcity_L: from ``scarcity``. near_WW: from ``nearness``.
    """

    def __init__(
        self, state: Layers, layers: Ints, target_L: Floats, scarcity_L: Floats, near_WW: NDArray[np.float32]
    ) -> None:
        self._state, self._near_WW = state, near_WW
        self._layers, self._target = layers, target_L
        self._each = np.arange(len(layers))
        # No copies if these are all layers.
        rows = self._rows = slice(None) if len(layers) == len(state.experts_LP) else layers
        self._experts_LP = state.experts_LP[rows]
        self._going_LP = np.float32(1) + (_RECEIVED - np.float32(1)) * state.foreign_LP[rows]
        self._shares_LE = state.shares_LE[rows].astype(np.float32)
        self._ranks_LW = state.ranks_LW[rows]
        self._hot = self._ranks_LW.argmax(axis=1)
        self.maximum = self._ranks_LW[self._each, self._hot]
        self._hot_LS = self._hot[:, None] * state.num_slots + np.arange(state.num_slots)
        self._mine_LS = at(self._experts_LP, self._hot_LS)
        self._mine_shares_LS = at(self._shares_LE, self._mine_LS)
        self._scarcity_L = scarcity_L

    def _price_of_room(self) -> NDArray[np.float32]:
        """The price by which a rank above the target leaves room to others above it: none for a
        single rank, little if half of the room is enough.
        """
        above_L = (self._ranks_LW - self._target[:, None]).clip(0).sum(axis=1)
        own_L = (self.maximum - self._target).clip(0)
        others_L = 1 - own_L / np.maximum(above_L, np.finfo(np.float64).tiny)
        return np.asarray(_PRICE * (self._scarcity_L * others_L**2) ** 2, np.float32)

    def best(self, *, replicas: bool) -> SlotSteps:
        """The most valuable step of each layer; without ``replicas`` only swaps are considered."""
        if not replicas:
            return self._swaps()
        found = [self._swaps(), self.replicate()]
        which = np.stack([steps.value for steps in found]).argmax(axis=0)
        columns = zip(*((steps.slots, steps.experts, steps.value) for steps in found), strict=True)
        return SlotSteps(*(np.stack(column)[which, self._each] for column in columns))

    def replicate(self) -> SlotSteps:
        """The most valuable further replica of an expert of the most loaded rank."""
        self._leaving()
        return self._replicas_of_the_hot()

    def split_largest(self) -> SlotSteps:
        """A further replica of the expert with the largest share, where one that can spare a
        replica has room for it. Maxima of ranks may rise by it; ``value`` is 1 where it is
        possible.
        """
        state, each = self._state, self._each
        shares_LE = state.shares_LE[self._rows]  # exact: of experts with equal loads none is larger
        expert = shares_LE.argmax(axis=1)
        largest = shares_LE[each, expert]
        too_large = largest + self._least_beside(expert) > self._target
        if not too_large.any():
            return self._single(self._hot_LS[:, 0], expert, np.zeros(len(each)))
        self._leaving()
        loads_LE, replicas_LE = state.loads_LE[self._rows], state.replicas_LE[self._rows]
        new = loads_LE[each, expert] / (replicas_LE[each, expert] + 1)
        left_LQ = at(loads_LE, self._experts_LQ) / np.maximum(at(replicas_LE, self._experts_LQ) - 1, 1)
        score_LQ = np.maximum(self._rests_LQ + new.astype(np.float32)[:, None], self._others_LQ)
        there_LQ = self._bits(self._ranks_LQ, expert[:, None]) & HELD > 0
        barred_LQ = there_LQ | ~self._free_LQ | (left_LQ >= largest[:, None])
        if not self._near_WW.all():
            holds_LW1 = self._state.bits_LWE[self._layers, :, expert][:, :, None] & HELD > 0
            near_LW = (holds_LW1 & (self._near_WW > 0)).any(axis=1)
            barred_LQ |= ~at(np.asarray(near_LW), self._ranks_LQ)
        score_LQ[barred_LQ] = np.inf
        place = score_LQ.argmin(axis=1)
        possible = np.isfinite(score_LQ[each, place]) & too_large
        return self._single(self._slots_LQ[each, place], expert, possible.astype(np.float64))

    def _least_beside(self, expert: Ints) -> Floats:
        """A lower bound of the mean load that ranks with a replica of ``expert`` hold besides it:
        the smallest experts of the layer.
        """
        num_slots, replicas = self._state.num_slots, self._state.replicas_LE[self._rows][self._each, expert]
        shares_LP = np.sort(at(self._shares_LE, self._experts_LP), axis=1).cumsum(axis=1, dtype=np.float64)
        last = replicas * (num_slots - 1) - 1
        least = np.where(last >= 0, shares_LP[self._each, last.clip(0, shares_LP.shape[1] - 1)], 0)
        return np.asarray(least / replicas.clip(1))

    def _leaving(self) -> None:
        """Slots whose expert may leave, as its other replicas stay below the target (EMPTY slots
        included): the load of their ranks without them, and the largest load that other ranks then
        have.
        """
        loads_LE, replicas_LE = self._state.loads_LE[self._rows], self._state.replicas_LE[self._rows]
        then_LE = loads_LE / np.maximum(replicas_LE - 1, 1)
        spare_LE = (replicas_LE >= 2) & (then_LE <= self._target[:, None])
        may_LP = at(spare_LE, self._experts_LP)
        layers, slots = may_LP.nonzero()
        numbers = np.bincount(layers, minlength=len(may_LP))
        nth = np.arange(len(layers)) - np.repeat(numbers.cumsum() - numbers, numbers)
        self._free_LQ = np.arange(max(1, int(numbers.max(initial=0)))) < numbers[:, None]
        self._slots_LQ = np.zeros(self._free_LQ.shape, np.int64)
        self._slots_LQ[layers, nth] = slots
        self._ranks_LQ = self._slots_LQ // self._state.num_slots
        self._experts_LQ = at(self._experts_LP, self._slots_LQ)
        ranks_LQ = at(self._ranks_LW, self._ranks_LQ)
        self._rests_LQ = ranks_LQ.astype(np.float32) - at(self._shares_LE, self._experts_LQ)
        more_LQ = at(then_LE - self._shares_LE, self._experts_LQ).astype(np.float32)
        self._others_LQ = self._twins(ranks_LQ) + more_LQ

    def _twins(self, ranks_LQ: Floats) -> NDArray[np.float32]:
        """The largest load of a rank that has another slot of the same expert; -inf without one."""
        num_columns, loads = self._state.num_experts + 1, ranks_LQ.astype(np.float32).ravel()
        keys = (self._experts_LQ + self._each[:, None] * num_columns).ravel()
        largest, second = np.full((2, len(self._each) * num_columns), -np.inf, np.float32)
        np.maximum.at(largest, keys, loads)
        # The last of equal experts is the most loaded; its largest twin is the second.
        first = np.empty(largest.shape, np.int64)
        numbers = np.arange(len(keys))
        equal = np.flatnonzero(loads == largest.take(keys))
        first[keys[equal]] = equal
        is_first = first.take(keys) == numbers
        np.maximum.at(second, keys, np.where(is_first, -np.float32(np.inf), loads))
        twins = np.where(is_first, second.take(keys), largest.take(keys)).reshape(ranks_LQ.shape)
        twins[self._experts_LQ == num_columns - 1] = -np.inf
        return np.asarray(twins, np.float32)

    def _bits(self, ranks: Ints, experts: Ints) -> NDArray[np.uint8]:
        """``Layers.bits_LWE`` of each layer at its ranks and experts."""
        _, num_ranks, num_columns = self._state.bits_LWE.shape
        first = (self._layers * num_ranks * num_columns).reshape(-1, *[1] * (ranks.ndim - 1))
        found = self._state.bits_LWE.ravel().take((ranks * num_columns + first) + experts)
        return np.asarray(found, np.uint8)

    def _value(self, gain: NDArray[np.float32]) -> NDArray[np.float32]:
        """The worth of lowering maxima by ``gain`` [L, ...], without the cost of transfers.
        Overwrites ``gain``.
        """
        above = (self.maximum - self._target).astype(np.float32)
        capped = np.minimum(gain, above.reshape(-1, *[1] * (gain.ndim - 1)))
        gain *= _BEYOND
        gain += capped
        return gain

    def _swaps(self) -> SlotSteps:
        """Exchanges a slot of the most loaded rank for one of a colder rank. Among swaps that move
        enough, the best moves little more, to a rank with much room or one that receives anyway, so
        that few ranks receive experts.
        """
        state, each, size = self._state, self._each, self._state.num_slots
        price = self._price_of_room()
        num = max(1, min(state.num_ranks, _CANDIDATES // size**2))
        cold_LK = _least(self._ranks_LW, num)
        slots_LSK = cold_LK[:, None] * size + np.arange(size)[:, None]
        theirs_LSK, going_LSK = at_all((self._experts_LP, self._going_LP), slots_LSK)
        shares_LSK = at(self._shares_LE, theirs_LSK)
        # A swap moves the load ``mine - theirs``, and may move as much as lies between the ranks.
        ranks_LK = at(self._ranks_LW, cold_LK)
        between_LK = (self.maximum[:, None] - ranks_LK).astype(np.float32)
        mine_LS11 = self._mine_shares_LS[:, :, None, None]
        filled_LSSK = mine_LS11 - shares_LSK[:, None]
        gain_LSSK = np.minimum(filled_LSSK, (between_LK[:, None] + shares_LSK)[:, None] - mine_LS11)
        value_LSSK = self._value(gain_LSSK)
        filled_LSSK *= price[:, None, None, None]
        value_LSSK /= np.maximum(filled_LSSK, 0, out=filled_LSSK) + 1
        room_LK = np.maximum(self._target[:, None] - ranks_LK, 0).astype(np.float32)
        opened_LSK = (going_LSK == 1) * (price[:, None] * room_LK)[:, None]
        going_LSK *= opened_LSK + 1
        hot_L11 = self._hot[:, None, None]
        going_LSK *= _COMING.take(self._bits(hot_L11, theirs_LSK))
        value_LSSK *= going_LSK[:, None]
        mine_LSK = _COMING.take(self._bits(cold_LK[:, None], self._mine_LS[:, :, None]))
        mine_LSK *= at(self._going_LP, self._hot_LS)[:, :, None]
        mine_LSK *= self._nearness(cold_LK)[:, None]
        mine_LSK *= functools.reduce(np.maximum, [value_LSSK[:, :, their] for their in range(size)])
        best = mine_LSK.reshape(len(each), -1).argmax(axis=1)
        mine, rank = np.divmod(best, num)
        their = value_LSSK[each, mine, :, rank].argmax(axis=1)
        return SlotSteps(
            np.stack([slots_LSK[each, their, rank], self._hot_LS[each, mine]], axis=1),
            np.stack([self._mine_LS[each, mine], theirs_LSK[each, their, rank]], axis=1),
            mine_LSK[each, mine, rank],
        )

    def _nearness(self, ranks: Ints) -> NDArray[np.float32]:
        """The weight of a move between the most loaded rank of each layer and others."""
        return at(self._near_WW[self._hot], ranks)

    def _replicas_of_the_hot(self) -> SlotSteps:
        """Gives an expert of the most loaded rank a further replica elsewhere."""
        each, mine_LS = self._each, self._mine_LS
        replicas_LS = at(self._state.replicas_LE[self._rows], mine_LS)
        new_LS = at(self._state.loads_LE[self._rows], mine_LS) / (replicas_LS + 1)
        maximum_L = self.maximum.astype(np.float32)
        gain_LSQ = (maximum_L[:, None] - self._rests_LQ)[:, None] - new_LS.astype(np.float32)[:, :, None]
        less_LS = self._mine_shares_LS - new_LS.astype(np.float32)
        np.minimum(gain_LSQ, less_LS[:, :, None], out=gain_LSQ)
        np.minimum(gain_LSQ, (maximum_L[:, None] - self._others_LQ)[:, None], out=gain_LSQ)
        value_LSQ = self._value(gain_LSQ)
        worth_LQ = at(self._going_LP, self._slots_LQ)
        worth_LQ *= self._nearness(self._ranks_LQ)
        worth_LQ[~self._free_LQ] = 0
        worth_LSQ = _COMING.take(self._bits(self._ranks_LQ[:, None], mine_LS[:, :, None]))
        worth_LSQ[mine_LS == self._state.num_experts] = 0
        value_LSQ *= worth_LQ[:, None]
        value_LSQ *= worth_LSQ
        best = value_LSQ.reshape(len(each), -1).argmax(axis=1)
        mine, place = np.unravel_index(best, value_LSQ.shape[1:])
        return self._single(self._slots_LQ[each, place], mine_LS[each, mine], value_LSQ[each, mine, place])

    def _single(self, slots: Ints, experts: Ints, value: NDArray[np.floating[Any]]) -> SlotSteps:
        none = np.full(len(slots), EMPTY)
        return SlotSteps(np.stack([slots, none], axis=1), np.stack([experts, none], axis=1), value)
