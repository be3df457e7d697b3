"""Exchanges: every rank gives at most one expert for one, and together they come to the target."""

from __future__ import annotations

import numpy as np

from lockstep.moe.balance.exchange import Exchanges
from lockstep.moe.balance.layers import HELD, Layers
from support.moe.eplb import placed_anew


def test_three_ranks_pass_experts_on_in_a_circle() -> None:
    """No swap of two ranks brings both of the hot ones to the target."""
    loads_LE = np.array([[6, 4, 5, 4.5, 4, 3]])
    state = Layers(loads_LE, np.arange(6).reshape(1, 3, 2))
    found = Exchanges(state, np.array([0]), np.array([9 * 3 / 26.5]))
    state.exchange(found.layers, found.slots, found.experts)
    assert len(found.slots) == 3
    assert state.maximum_L()[0] <= 9 * 3 / 26.5 + 1e-6


def test_ranks_exchange_one_expert_at_most_and_hold_none_twice() -> None:
    dice = np.random.default_rng(72)
    before_LE = dice.lognormal(0, 1, (12, 64))
    loads_LE = before_LE * dice.lognormal(0, 0.3, before_LE.shape)
    state = Layers(loads_LE, placed_anew(before_LE, 36, 4).experts_LWS)
    before_LP, was_L = state.experts_LP.copy(), state.maximum_L()
    layers = np.arange(2, 12)
    found = Exchanges(state, layers, np.full(len(layers), 1.05))
    state.exchange(found.layers, found.slots, found.experts)
    assert not (state.experts_LP[:2] != before_LP[:2]).any()
    assert ((state.experts_LP != before_LP).reshape(12, 36, 4).sum(axis=2) <= 1).all()
    assert np.array_equal(np.sort(state.experts_LP), np.sort(before_LP))
    occupied_LW = (state.experts_LP < 64).reshape(12, 36, 4).sum(axis=2)
    assert ((state.bits_LWE & HELD > 0).sum(axis=2) == occupied_LW).all(), "an expert twice on a rank"
    assert np.allclose(state.ranks_LW, state.shares_LP(np.arange(12)).reshape(12, 36, 4).sum(axis=2))
    assert np.median(state.maximum_L()[2:]) < 1.05 + 0.2 * np.median(was_L[2:] - 1.05)
