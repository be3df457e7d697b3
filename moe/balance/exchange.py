"""Experts exchanged among many ranks of a layer at once, each of which gives one and receives one.

A rank that gives up an expert of load ``a`` and is ``d`` below the target has room for one of up to
``a + d``; a rank above the target has room for less than it gives. All experts given up find room
if, above every load, there are as many rooms as experts. So a slot is an interval of load: of a hot
rank, from its room to its expert, one that has to be covered; of another rank, from its expert to
its room, one that covers. Wanted are one interval of every hot rank, and the fewest of other ranks
that cover them.

Prices of load rise where intervals are not covered and fall where more cover than have to
(Lagrangian relaxation), and every rank chooses by them. Then single choices change, by what they
leave uncovered. At last experts and rooms are matched, both in order of load.

Suffixes: L layers, W ranks, S slots per rank, P = W S slots in order of load. Intervals are
[S, L, W]; their ends are indices of [L, P] arrays laid flat.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .layers import HELD, Floats, Ints, Layers, at

Reals = NDArray[np.float32]

_EXACT = 1e-9
_UNIT = float(1 << 30)  # sums of integers are exact, and seven times as fast as those of floats
# Rounds of pricing. A rank's choice sharpens from the first temperature to the last, in experts
# received. Rate and momentum came closest in as many rounds.
_ROUNDS, _HOT, _COLD, _RATE, _MOMENTUM = 60, 0.1, 0.01, 0.05, 0.85
_SPARE = np.float32(0.2)  # intervals more than are needed, which whole choices need beyond parts
_CHANGES = 24
# The price of receiving an expert, in units of the least room that is needed: far below 1, as each
# rank that stays too hot costs steps later.
_RECEIPT = np.float32(0.05)
_LEFT = np.float32(3)  # the price of load that a rank keeps above the target
_LEAST = 1e-6  # least gain of a change, as a share of a mean load


class Exchanges:
    """Arrays over ``layers``, ``slots`` and the ``experts`` that come into them, one into each rank
    at most, so that loads fall to target_L or near it. Numbers of replicas and ``state`` do not
    change.
    """

    def __init__(self, state: Layers, layers: Ints, target_L: Floats) -> None:
        self._state, self._rows, self._each = state, layers, np.arange(len(layers))
        slack_LW = target_L[:, None] - state.ranks_LW[layers]
        self._hot_LW = slack_LW < -_EXACT
        self._least_L = _least_room(slack_LW)
        shares_LP = state.shares_LP(layers)
        self._given_SLW = self._by_slot(shares_LP)
        self._room_SLW = self._given_SLW + slack_LW
        self._intervals(shares_LP)
        chosen_LW = self._changed(self._priced())
        self.layers, self.slots, self.experts = self._matched(chosen_LW)

    def _by_slot(self, values_LP: NDArray[Any]) -> NDArray[Any]:
        size = self._state.num_slots
        return np.stack([values_LP[:, slot::size] for slot in range(size)])

    def _intervals(self, shares_LP: Floats) -> None:
        """The ends of all intervals, and what ranks pay for them beside the price of load."""
        num_places = shares_LP.shape[1]
        order_LP = shares_LP.argsort(axis=1, kind="stable")
        sorted_LP = np.take_along_axis(shares_LP, order_LP, axis=1)
        places_LP = np.empty_like(order_LP)
        np.put_along_axis(places_LP, order_LP, np.arange(1, num_places + 1)[None], axis=1)
        # All layers are searched as one sorted array, offset so that their ranges never overlap.
        apart_L1 = 4.0 * self._state.num_ranks * self._each[:, None]
        rooms_SLW = np.clip(self._room_SLW, -1.0, 2.0 * self._state.num_ranks) + (_EXACT + apart_L1)
        above_SLW = (sorted_LP + apart_L1).ravel().searchsorted(rooms_SLW.ravel(), side="right")
        self._rooms_SLW: Ints = above_SLW.reshape(rooms_SLW.shape)
        self._experts_SLW: Ints = self._by_slot(places_LP) + self._each[:, None] * num_places
        self._widths_LP = np.diff(sorted_LP, axis=1, prepend=0)
        # An expert that came here may move on: its rank receives no more than before.
        self._receipts_SLW = np.float32(1) - self._by_slot(self._state.foreign_LP[self._rows])
        left_SLW = (sorted_LP[:, :1] - self._room_SLW).clip(0) * self._hot_LW
        self._left_SLW: Reals = _LEFT * left_SLW.astype(np.float32)

    def _priced(self) -> Ints:
        """The slot that each rank chooses by prices, -1 for none."""
        scale_L1 = np.maximum(self._least_L, 0.05).astype(np.float32)[:, None]
        own_SLW = self._receipts_SLW + self._left_SLW / scale_L1
        density_LP = np.repeat(1 / scale_L1, self._widths_LP.shape[1], axis=1)
        momentum_LP = np.zeros_like(density_LP)
        units_LP = (_UNIT * self._widths_LP).astype(np.float32)
        stays_LW = (~self._hot_LW).astype(np.float32)
        for heat in np.geomspace(_HOT, _COLD, _ROUNDS).astype(np.float32):
            costs_SLW = self._costs(own_SLW, density_LP * units_LP)
            least_LW = costs_SLW.min(axis=0)
            np.minimum(least_LW, 0, out=least_LW, where=~self._hot_LW)
            costs_SLW -= least_LW
            costs_SLW *= -1 / heat
            parts_SLW = np.exp(costs_SLW, out=costs_SLW)
            parts_SLW /= parts_SLW.sum(axis=0) + stays_LW * np.exp(np.minimum(least_LW, 0) / heat)
            ends = np.zeros(density_LP.size + 1)
            ends[self._experts_SLW] = parts_SLW
            ends -= np.bincount(self._rooms_SLW.ravel(), parts_SLW.ravel(), len(ends))
            spare_LP = _below(ends * _UNIT)[1:-1].reshape(density_LP.shape).astype(np.float32)
            rate_L1 = np.sqrt(heat / np.float32(_HOT)) * np.float32(_RATE) / scale_L1
            momentum_LP *= np.float32(_MOMENTUM)
            momentum_LP -= (rate_L1 / _UNIT) * spare_LP - rate_L1 * _SPARE
            density_LP += momentum_LP
            np.maximum(density_LP, 0, out=density_LP)
        costs_SLW = self._costs(own_SLW, density_LP * units_LP)
        chooses_LW = self._hot_LW | (costs_SLW.min(axis=0) < 0)
        return np.where(chooses_LW, costs_SLW.argmin(axis=0), -1)

    def _costs(self, own_SLW: Reals, prices_LP: NDArray[Any]) -> Reals:
        """The cost of every interval; negative where it covers more than it costs."""
        below = _below(prices_LP)
        costs_SLW = (below.take(self._experts_SLW) - below.take(self._rooms_SLW)).astype(np.float32)
        costs_SLW *= 1 / _UNIT
        costs_SLW += own_SLW
        return costs_SLW

    def _changed(self, chosen_LW: Ints) -> Ints:
        """``chosen_LW`` after single changes: each the best of its layer, while load that nothing
        covers falls by more than ranks receive for it.
        """
        hot_LW = self._hot_LW
        low_SLW = np.where(hot_LW, self._rooms_SLW, self._experts_SLW)
        high_SLW = np.where(hot_LW, self._experts_SLW, self._rooms_SLW)
        widths = (_UNIT * self._widths_LP).astype(np.int64).ravel()
        # More load to cover costs where nothing is spare; more cover gains where some is missing.
        full = len(widths) + 1
        new_LW = np.where(hot_LW, full, 0)
        old_LW = np.where(hot_LW, 0, full)
        low_new_SLW, high_new_SLW = low_SLW + new_LW, high_SLW + new_LW
        sign_LW = np.where(hot_LW, 1, -1)
        receipt_L1 = (_RECEIPT * self._least_L[:, None]).astype(np.float32)
        own_SLW = (_UNIT * (receipt_L1 * self._receipts_SLW + self._left_SLW)).astype(np.int64)
        chosen_LW = chosen_LW.copy()
        options = low_SLW, high_SLW, own_SLW
        was_LW = [_of_choice(values_SLW, chosen_LW, 0) for values_SLW in options]
        for _ in range(_CHANGES):
            was_low_LW, was_high_LW, was_own_LW = was_LW
            ends = np.bincount(was_high_LW.ravel(), sign_LW.ravel(), full)
            ends -= np.bincount(was_low_LW.ravel(), sign_LW.ravel(), full)
            spare = _below(ends)[1:-1]
            missing = _below(widths * (spare < 0))
            needed = _below(widths * (spare <= 0))
            both, equal = np.concatenate([missing, needed]), needed - missing
            keeps_LW = both.take(was_high_LW + old_LW) - both.take(was_low_LW + old_LW)
            change_SLW = both.take(high_new_SLW)
            change_SLW -= both.take(low_new_SLW)
            change_SLW -= keeps_LW
            change_SLW *= sign_LW
            shared_SLW = np.maximum(low_SLW, was_low_LW)
            change_SLW += equal.take(shared_SLW)
            change_SLW -= equal.take(np.maximum(np.minimum(high_SLW, was_high_LW), shared_SLW))
            change_SLW += own_SLW
            change_SLW -= was_own_LW
            none_LW = np.where(hot_LW, 0, keeps_LW - was_own_LW)
            best_LW = np.minimum(change_SLW.min(axis=0), none_LW)
            better = np.flatnonzero(best_LW.min(axis=1) < -_LEAST * _UNIT)
            if not len(better):
                break
            rank = best_LW[better].argmin(axis=1)
            slot = change_SLW[:, better, rank].argmin(axis=0)
            slot = np.where(change_SLW[slot, better, rank] <= none_LW[better, rank], slot, -1)
            chosen_LW[better, rank] = slot
            for was, values in zip(was_LW, options, strict=True):
                was[better, rank] = np.where(slot >= 0, values[slot, better, rank], 0)
        return chosen_LW

    def _matched(self, chosen_LW: Ints) -> tuple[Ints, Ints, Ints]:
        """The n-th largest expert comes into the n-th largest room, or near it where the rank has
        that expert in another slot. Layers where none is near are left out.
        """
        state, each_L1 = self._state, self._each[:, None]
        given_LW = _of_choice(self._given_SLW, chosen_LW, np.float64(-1))
        room_LW = _of_choice(self._room_SLW, chosen_LW, -np.inf)
        slots_LW = np.arange(state.num_ranks) * state.num_slots + chosen_LW
        experts_LW = at(state.experts_LP[self._rows], slots_LW.clip(0))
        ranks_LW = (-room_LW).argsort(axis=1, kind="stable")
        into_LW = at(slots_LW, ranks_LW)
        leaves_LW = at(experts_LW, ranks_LW)
        comes_LW = at(experts_LW, (-given_LW).argsort(axis=1, kind="stable"))
        numbers = (chosen_LW >= 0).sum(axis=1)
        taken_LW = np.arange(state.num_ranks) < numbers[:, None]
        held_LW = self._held(each_L1, ranks_LW, comes_LW, leaves_LW)
        for layer, place in np.argwhere(held_LW & taken_LW):
            ranks, comes, leaves = (
                array[layer, : numbers[layer]] for array in (ranks_LW, comes_LW, leaves_LW)
            )
            barred = self._held(layer, ranks[place], comes, leaves[place])
            barred |= self._held(layer, ranks, comes[place], leaves)
            other = int(np.where(barred, len(ranks), abs(np.arange(len(ranks)) - place)).argmin())
            taken_LW[layer] &= not barred[other]
            comes[place], comes[other] = comes[other], comes[place]
        taken_LW &= comes_LW != leaves_LW
        layers, nth = taken_LW.nonzero()
        return self._rows[layers], into_LW[layers, nth], comes_LW[layers, nth]

    def _held(self, layers: Ints | int, ranks: Ints, experts: Ints, leaves: Ints) -> NDArray[np.bool_]:
        """Whether ranks hold experts elsewhere than in the slot that ``leaves`` leaves."""
        bits = self._state.bits_LWE[self._rows[layers], ranks, experts]
        return np.asarray((bits & HELD > 0) & (experts != leaves))


def _of_choice(values_SLW: NDArray[Any], chosen_LW: Ints, otherwise: float) -> NDArray[Any]:
    found = np.take_along_axis(values_SLW, chosen_LW.clip(0)[None], axis=0)[0]
    return np.where(chosen_LW >= 0, found, otherwise)


def _below(values: NDArray[Any]) -> Ints:
    """The sum of the values before each place, as integers, over layers laid flat: what lies
    between two places of a layer is the difference.
    """
    sums = np.zeros(values.size + 1, np.int64)
    values.ravel().astype(np.int64).cumsum(out=sums[1:])
    return sums


def _least_room(slack_LW: Floats) -> Floats:
    """The room of the fullest rank needed to take the excess of others, emptiest ranks first."""
    rooms_LW = np.sort(slack_LW.clip(0), axis=1)[:, ::-1]
    needed_L = (rooms_LW.cumsum(axis=1) < (-slack_LW).clip(0).sum(axis=1, keepdims=True)).sum(axis=1)
    return np.asarray(at(rooms_LW, needed_L.clip(max=rooms_LW.shape[1] - 1)[:, None])[:, 0])
