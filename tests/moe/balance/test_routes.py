"""Routes to replicas: equal shares, near ones first, the same table on every rank."""

from __future__ import annotations

import numpy as np
from hypothesis import given, strategies as st

from lockstep.moe.balance.placement import EMPTY, Placement, contiguous
from lockstep.moe.balance.routes import TURNS, places_by_turn, share_turns
from lockstep.moe.balance.start import starting_placement


@given(st.integers(2, 12), st.integers(1, 4), st.data())
def test_replicas_share_all_turns_evenly_and_near_ones_come_first(
    num_ranks: int, num_nodes: int, data: st.DataObject
) -> None:
    ranks_R = np.array(sorted(data.draw(st.sets(st.integers(0, num_ranks - 1), min_size=1))))
    node_W = np.arange(num_ranks) * num_nodes // num_ranks
    chosen = [share_turns(ranks_R[None], node_W, source)[0] for source in range(num_ranks)]
    chosen_CW = np.stack(chosen, axis=1)
    shares = np.bincount(chosen_CW.ravel(), minlength=len(ranks_R))
    assert chosen_CW.min() >= 0 and shares.max() - shares.min() <= 1
    assert all((chosen_CW[:, rank] == replica).all() for replica, rank in enumerate(ranks_R))
    # A rank sends to another node only when the replicas of its own have their shares from it.
    far_CW = node_W[ranks_R[chosen_CW]] != node_W
    for node in np.unique(node_W[ranks_R]):
        here = np.flatnonzero(node_W[ranks_R] == node)
        if far_CW[:, node_W == node].any():
            from_here = np.bincount(chosen_CW[:, node_W == node].ravel(), minlength=len(ranks_R))
            assert (from_here[here] == shares[here]).all()


def test_two_replicas_on_two_nodes_keep_every_token_on_its_node() -> None:
    placement = Placement(np.array([[[0, 1], [2, EMPTY], [0, 3], [4, EMPTY]]], np.int32), 5)
    for source, place in ((0, 0), (1, 0), (2, 4), (3, 4)):
        places_LEC = places_by_turn(placement, source, [0, 0, 1, 1])
        assert places_LEC[0, 0].tolist() == [place] * TURNS
        assert (places_LEC[0, 1:] == placement.homes_LE[0, 1:, None]).all()


def test_without_replicas_there_is_one_turn() -> None:
    placement = contiguous(3, 7, 2)
    assert np.array_equal(places_by_turn(placement, 1)[:, :, 0], placement.homes_LE)
    assert places_by_turn(contiguous(0, 7, 2), 1).shape == (0, 7, 1), "a stage without experts"


@given(st.integers(2, 5), st.integers(1, 12), st.integers(0, 20), st.booleans(), st.integers(0, 99))
def test_a_start_fills_redundant_slots_with_replicas(
    num_ranks: int, num_experts: int, redundant: int, loaded: bool, seed: int
) -> None:
    redundant = min(redundant, num_experts * (num_ranks - 1))
    loads_LE = np.random.default_rng(seed).lognormal(0, 1, (2, num_experts)) if loaded else None
    placement = starting_placement(2, num_experts, num_ranks, redundant, loads_LE)
    assert placement.num_slots == -(-(num_experts + redundant) // num_ranks)
    for layer in placement.experts_LWS:
        for slots in layer:
            held = slots[slots != EMPTY]
            assert len(set(held.tolist())) == len(held), "an expert twice on a rank"
        assert (layer != EMPTY).sum() >= min(num_experts + redundant, layer.size) - (
            redundant > 0
        ) * num_ranks
