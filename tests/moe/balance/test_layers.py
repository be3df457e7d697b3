"""The state of layers under change: after any steps it is that of a placement looked at anew."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from lockstep.moe.balance.layers import FOREIGN, HELD, Layers
from lockstep.moe.balance.placement import EMPTY
from lockstep.moe.balance.steps import Search, _least, nearness, scarcity


def _random(dice: np.random.Generator) -> Layers:
    ranks, slots, experts = dice.integers(2, 6), dice.integers(1, 4), dice.integers(1, 6)
    experts_LWS = np.full((2, ranks, slots), EMPTY)
    for layer in range(2):
        for rank in range(ranks):
            held = dice.permutation(experts)[:slots]
            experts_LWS[layer, rank, : len(held)] = np.where(dice.random(len(held)) < 0.9, held, EMPTY)
    return Layers(dice.lognormal(0, 1, (2, experts)), experts_LWS)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_puts_and_swaps_leave_what_a_fresh_look_would_find(seed: int) -> None:
    dice = np.random.default_rng(seed)
    state = _random(dice)
    first, layers = state.placed_LWS(), np.arange(2)
    for _ in range(6):
        slots = dice.integers(0, state.experts_LP.shape[1], (2, 2))
        here, there = state.experts_LP[layers, slots]
        ranks = slots // state.num_slots
        held = state.bits_LWE & HELD > 0
        may = ~held[layers, ranks[0], there] & ~held[layers, ranks[1], here] & (ranks[0] != ranks[1])
        state.swap(layers[may], slots[:, may])
        expert = dice.integers(0, state.num_experts + 1, 2)
        may = ~(state.bits_LWE[layers, ranks[0], expert] & HELD > 0)
        state.put(layers[may], slots[0, may], expert[may])
    fresh = Layers(state.loads_LE[:, :-1], state.placed_LWS())
    for name in ("experts_LP", "replicas_LE", "shares_LE", "ranks_LW"):
        np.testing.assert_allclose(getattr(state, name), getattr(fresh, name), atol=1e-12, err_msg=name)
    assert np.array_equal(state.bits_LWE & HELD, fresh.bits_LWE & HELD)
    had_LWE = (first[..., None] == np.arange(state.num_experts)).any(axis=2)
    assert np.array_equal(state.bits_LWE[:, :, :-1] & FOREIGN > 0, ~had_LWE)
    now_LWS = state.placed_LWS()
    foreign_LWS = (now_LWS != EMPTY) & ~(first[:, :, None] == now_LWS[..., None]).any(axis=3)
    assert np.array_equal(state.foreign_LP.reshape(now_LWS.shape) > 0, foreign_LWS)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_the_value_of_a_step_is_what_the_maximum_falls_by(seed: int, replicas: bool) -> None:
    """A step is worth 1.4 times less for each expert that a rank receives because of it."""
    state = _random(np.random.default_rng(seed))
    layers = np.arange(2)
    near_WW = nearness(np.zeros(state.num_ranks, np.int64), within_nodes=False)
    steps = Search(state, layers, np.zeros(2), np.zeros(2), near_WW).best(replicas=replicas)
    for layer in layers[steps.value > 0]:
        one, slots, experts = layers[[layer]], steps.slots[layer], steps.experts[layer]
        changed = slots[slots != EMPTY]
        came = state.received(one.repeat(len(changed)), changed, experts[: len(changed)]).sum()
        before_W = state.ranks_LW[layer].copy()
        if len(changed) == 2:
            state.swap(one, slots[:, None])
        else:
            state.put(one, slots[:1], experts[:1])
        after_W = state.ranks_LW[layer]
        worst = max(after_W[before_W.argmax()], after_W[after_W > before_W + 1e-9].max(initial=0))
        gain = steps.value[layer] * 1.4**came / 1.001  # above the target, and a thousandth
        assert gain == pytest.approx(before_W.max() - worst, abs=1e-5)


@pytest.mark.parametrize(("scarce", "best"), [(1.0, (7, 1)), (0.0, (7, 0))])
def test_where_room_is_scarce_a_swap_moves_no_more_than_it_has_to(
    scarce: float, best: tuple[int, int]
) -> None:
    """Rank 0 is 8 above the target, and another one 7. It gives 10 to the rank with most room; else
    18, after which both are most equal.
    """
    experts_LWS = np.arange(8, dtype=np.int32).reshape(1, 4, 2)
    loads = np.array([[58.0, 50, 57, 50, 42, 49, 30, 40]])  # 108, 107, 91, 70
    state = Layers(loads, experts_LWS)
    target = np.array([100 / loads.sum() * 4])
    near_WW = nearness(np.zeros(4, np.int64), within_nodes=False)
    steps = Search(state, np.arange(1), target, np.array([scarce]), near_WW).best(replicas=False)
    assert tuple(steps.slots[0].tolist()) == best


@pytest.mark.parametrize("num", [1, 5, 9])
def test_the_least_loads_are_found(num: int) -> None:
    loads_LW = np.random.default_rng(1).lognormal(0, 1, (7, 9))
    found_LW = _least(loads_LW, num)
    assert np.array_equal(np.sort(found_LW, axis=1), np.sort(np.argsort(loads_LW, axis=1)[:, :num], axis=1))


def test_scarcity_is_load_above_in_room_below() -> None:
    loads_LW = np.array([[3.0, 1, 1, 1], [1.5, 1, 1, 0.5], [1, 1, 1, 1], [4, 0, 0, 0]])
    assert scarcity(loads_LW, np.array([2.0, 1.25, 1.5, 0.5])).tolist() == [1 / 3, 0.2, 0, 1]
