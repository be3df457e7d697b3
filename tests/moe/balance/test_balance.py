"""Balance: few experts move, never for the worse, and within every limit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from numpy.typing import NDArray

from lockstep.moe.balance.balance import (
    NOWHERE,
    Balanced,
    Limits,
    balance,
    imbalance,
    weighted_imbalance,
)
from lockstep.moe.balance.layers import Layers
from lockstep.moe.balance.placement import EMPTY, Placement, contiguous
from support.moe.eplb import placed_anew


@st.composite
def problems(draw: st.DrawFn) -> tuple[NDArray[np.float64], Placement]:
    """Loads, and a placement with slots that are empty, doubled on a rank, or replicas."""
    layers, ranks, slots = draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(st.integers(1, 4))
    experts = draw(st.integers(1, ranks * slots))
    dice = np.random.default_rng(draw(st.integers(0, 10**6)))
    extra = dice.integers(EMPTY, experts, (layers, ranks * slots - experts))
    all_LP = np.concatenate([np.tile(np.arange(experts), (layers, 1)), extra], axis=1)
    placement = Placement(
        dice.permuted(all_LP, axis=1).reshape(layers, ranks, slots).astype(np.int32), experts
    )
    loads_LE = np.floor(dice.lognormal(3, draw(st.sampled_from([0.0, 1.0, 3.0])), (layers, experts)))
    return loads_LE * dice.integers(0, 2, (layers, 1)), placement


def apply(before: Placement, result: Balanced, dead: frozenset[int] = frozenset()) -> NDArray[np.int32]:
    """The placement after the moves, by the moves alone, with every source checked."""
    experts_LWS = before.experts_LWS.copy()
    moves = result.moves
    parts = (moves.layers, moves.ranks, moves.slots, moves.experts, moves.sources)
    for layer, rank, slot, expert, source in zip(*(part.tolist() for part in parts), strict=True):
        holders = {int(w) for w in (before.experts_LWS[layer] == expert).any(axis=1).nonzero()[0]} - dead
        assert rank not in dead and rank not in holders
        assert source in holders if holders else source == NOWHERE
        experts_LWS[layer, rank, slot] = expert
    return experts_LWS


@settings(max_examples=150, deadline=None)
@given(problems(), st.one_of(st.none(), st.integers(0, 8)), st.floats(1.0, 1.5))
def test_moves_lead_to_the_placement_within_the_budget_and_never_for_the_worse(
    problem: tuple[NDArray[np.float64], Placement], budget: int | None, target: float
) -> None:
    loads_LE, before = problem
    result = balance(loads_LE, before, Limits(max_received=budget, target=target))
    told, after = apply(before, result), result.placement
    # A slot that another slot of its rank doubles, or that its expert has left, may be told empty.
    assert ((told == after.experts_LWS) | (after.experts_LWS == EMPTY)).all()
    assert budget is None or len(result.moves) <= budget
    was_L, is_L = imbalance(loads_LE, before), imbalance(loads_LE, after)
    assert (is_L <= was_L + 1e-9).all()
    moved = np.unique(result.moves.layers)
    assert (is_L[moved] < was_L[moved]).all(), "bytes were moved for nothing"


@settings(max_examples=60, deadline=None)
@given(problems(), st.integers(1, 3))
def test_the_same_input_gives_the_same_moves_and_does_not_change(
    problem: tuple[NDArray[np.float64], Placement], num_nodes: int
) -> None:
    loads_LE, before = problem
    nodes = tuple(rank % num_nodes for rank in range(before.num_ranks))
    copy = before.experts_LWS.copy(), loads_LE.copy()
    first, second = (balance(loads_LE, before, Limits(node_W=nodes, target=1.0)) for _ in range(2))
    assert np.array_equal(first.placement.experts_LWS, second.placement.experts_LWS)
    assert np.array_equal(first.moves.sources, second.moves.sources)
    assert np.array_equal(before.experts_LWS, copy[0]) and np.array_equal(loads_LE, copy[1])


@settings(max_examples=100, deadline=None)
@given(problems(), st.integers(1, 3))
def test_within_nodes_no_expert_reaches_a_node_that_lacked_it(
    problem: tuple[NDArray[np.float64], Placement], num_nodes: int
) -> None:
    loads_LE, before = problem
    nodes = np.arange(before.num_ranks) % num_nodes
    limits = Limits(node_W=tuple(nodes.tolist()), target=1.0, within_nodes=True)
    moves = balance(loads_LE, before, limits).moves
    assert (nodes[moves.sources] == nodes[moves.ranks]).all()


@settings(max_examples=100, deadline=None)
@given(problems(), st.sets(st.integers(0, 5), max_size=2), st.integers(0, 3))
def test_dead_ranks_hold_nothing_and_every_expert_keeps_a_slot(
    problem: tuple[NDArray[np.float64], Placement], dead: set[int], budget: int
) -> None:
    loads_LE, before = problem
    gone = frozenset(dead & set(range(before.num_ranks)))
    alive = [rank for rank in range(before.num_ranks) if rank not in gone]
    limits = Limits(dead=gone, max_received=budget)
    if len(alive) * before.num_slots < before.num_experts:
        with pytest.raises(ValueError, match="allowed are fewer dead ranks or more redundant experts"):
            balance(loads_LE, before, limits)
        return
    result = balance(loads_LE, before, limits)  # ``Placement`` refuses a missing expert
    apply(before, result, gone)
    assert (result.placement.experts_LWS[:, sorted(gone)] == EMPTY).all()
    kept_LE = np.stack(
        [np.isin(np.arange(before.num_experts), slots) for slots in before.experts_LWS[:, alive]]
    )
    assert len(result.moves) <= budget + (~kept_LE).sum()


def test_one_swap_mends_two_ranks() -> None:
    result = balance([[9, 8, 1, 2]], contiguous(1, 4, 2), Limits(target=1.0))
    assert result.placement.experts_LWS.tolist() == [[[3, 1], [2, 0]]]
    assert (result.moves.slots.tolist(), result.moves.sources.tolist()) == ([0, 1], [1, 0])
    assert imbalance([[9, 8, 1, 2]], result.placement).tolist() == [1.0]


def test_a_hot_expert_gets_a_replica_in_the_slot_of_a_cold_one() -> None:
    before = Placement(np.array([[[0, 1], [2, 1], [3, 4]]], np.int32), 5)  # expert 1 twice
    result = balance([[80, 2, 30, 20, 20]], before, Limits(target=1.4))
    replicas = np.bincount(result.placement.experts_LWS.ravel(), minlength=5)
    assert replicas.tolist() == [2, 1, 1, 1, 1] and len(result.moves) == 1


def test_sources_on_the_node_come_first() -> None:
    before = Placement(np.array([[[0, EMPTY], [0, 1], [2, EMPTY], [3, EMPTY]]], np.int32), 4)
    result = balance([[96, 1, 1, 1]], before, Limits(node_W=(0, 1, 1, 0)))
    sources = dict(zip(result.moves.ranks.tolist(), result.moves.sources.tolist(), strict=True))
    assert sources == {2: 1, 3: 0}


def test_a_lost_rank_s_experts_come_back_where_load_is_least() -> None:
    before = Placement(np.array([[[0, EMPTY], [1, EMPTY], [2, EMPTY]]], np.int32), 3)
    result = balance([[5, 3, 4]], before, Limits(dead=frozenset({0}), max_received=0))
    assert result.placement.experts_LWS.tolist() == [[[EMPTY, EMPTY], [1, 0], [2, EMPTY]]]
    assert result.moves.sources.tolist() == [NOWHERE]


def drifted(seed: int, drift: float, layers: int = 8) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Lognormal loads before and after a drift."""
    dice = np.random.default_rng(seed)
    loads_LE = dice.lognormal(0, 1, (layers, 256))
    return loads_LE, loads_LE * dice.lognormal(0, drift, loads_LE.shape)


@pytest.mark.parametrize("redundant", [0, 32, 64])
@pytest.mark.parametrize("ranks", [32, 64])
@pytest.mark.parametrize("drift", [0.01, 0.1, 0.3])
def test_better_balance_for_less_than_placing_anew(redundant: int, ranks: int, drift: float) -> None:
    before_LE, loads_LE = drifted(redundant + ranks, drift)
    slots = -(-(256 + redundant) // ranks)
    nodes = ranks // 8
    before = placed_anew(before_LE, ranks, slots, nodes, 8)
    anew = placed_anew(loads_LE, ranks, slots, nodes, 8)
    there_LWSS = anew.experts_LWS[..., None] == before.experts_LWS[:, :, None]
    received = int((~there_LWSS.any(axis=3)).sum())
    goal = imbalance(loads_LE, anew).mean()
    least = Layers(loads_LE, before.experts_LWS).level_L().mean()  # more than 1 where one expert binds
    ours = balance(loads_LE, before, Limits(target=max(1.002, goal / least)))
    assert imbalance(loads_LE, ours.placement).mean() <= goal * 1.002
    assert len(ours.moves) < 0.4 * received


def test_three_percent_of_the_slots_mend_a_drift_of_a_tenth_at_32_ranks() -> None:
    before_LE, loads_LE = drifted(5, 0.1, layers=58)
    before = placed_anew(before_LE, 32, 9, 4, 8)
    ours = balance(loads_LE, before, Limits(target=1.06, max_received=round(0.03 * before.experts_LWS.size)))
    assert imbalance(loads_LE, ours.placement).mean() <= 1.07


@pytest.mark.parametrize(
    ("ranks", "slots", "drift", "share"),
    [(72, 4, 0.01, 0.06), (72, 4, 0.1, 0.165), (72, 4, 0.3, 0.2), (144, 2, 0.1, 0.07), (144, 2, 0.3, 0.12)],
)
def test_a_fifth_of_the_bytes_gives_the_same_balance_at_many_ranks(
    ranks: int, slots: int, drift: float, share: float
) -> None:
    before_LE, loads_LE = drifted(7, drift)
    before, anew = (placed_anew(loads, ranks, slots) for loads in (before_LE, loads_LE))
    there_LWSS = anew.experts_LWS[..., None] == before.experts_LWS[:, :, None]
    received = int((~there_LWSS.any(axis=3)).sum())
    limits = Limits(target=1.018 if ranks == 72 else 1.0, max_received=int(received * share))
    ours = balance(loads_LE, before, limits)
    assert len(ours.moves) <= received * share
    assert imbalance(loads_LE, ours.placement).mean() <= imbalance(loads_LE, anew).mean() + 1e-9


def test_experts_of_equal_loads_do_not_take_turns_in_having_a_replica() -> None:
    loads_LE = np.array([[load, load, 1] for load in range(3, 40)], np.float64)
    before = Placement(np.tile(np.array([0, 1, 1, 2], np.int32)[:, None], (len(loads_LE), 1, 1)), 3)
    assert not len(balance(loads_LE, before, Limits(target=1.0)).moves)


def test_an_expert_that_leaves_no_room_for_others_beside_it_gets_a_replica() -> None:
    """Replicas with 0.98 of a rank's mean load, between which no three experts are small enough."""
    dice = np.random.default_rng(72)
    before_LE = dice.lognormal(0, 1, (58, 256))
    loads_LE = before_LE * dice.lognormal(0, 0.3, before_LE.shape)
    layers = [21, 46]
    before = placed_anew(before_LE[layers], 72, 4)
    assert (imbalance(loads_LE[layers], before) > 1.4).all()
    ours = balance(loads_LE[layers], before, Limits(target=1.02))
    assert (imbalance(loads_LE[layers], ours.placement) < 1.03).all()


def test_layers_count_by_their_load() -> None:
    placement = contiguous(2, 2, 2)
    assert weighted_imbalance(np.array([[3.0, 1.0], [300.0, 300.0]]), placement) == pytest.approx(
        1.0033, abs=1e-3
    )
    assert weighted_imbalance(np.zeros((2, 2)), placement) == 1.0
