"""Placement: every expert has a home, uneven splits included."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, strategies as st

from lockstep.moe.balance.balance import balance
from lockstep.moe.balance.placement import EMPTY, Placement, contiguous


@given(layers=st.integers(1, 4), experts=st.integers(1, 70), ranks=st.integers(1, 9))
def test_contiguous_is_even_and_complete(layers: int, experts: int, ranks: int) -> None:
    placement = contiguous(layers, experts, ranks)
    assert (placement.num_layers, placement.num_ranks) == (layers, ranks)
    for layer in range(layers):
        per_rank = [[e for e in placement.experts_of(rank, layer) if e != EMPTY] for rank in range(ranks)]
        assert [expert for held in per_rank for expert in held] == list(range(experts))
        assert max(map(len, per_rank)) - min(map(len, per_rank)) <= 1
        for expert in range(experts):
            rank, slot = divmod(int(placement.homes_LE[layer, expert]), placement.num_slots)
            assert placement.experts_of(rank, layer)[slot] == expert


def test_the_home_of_a_replicated_expert_is_its_first_slot() -> None:
    placement = Placement(np.array([[[EMPTY, 1], [0, 1]]], np.int32), 2)
    assert placement.homes_LE.tolist() == [[2, 1]]


def test_an_expert_without_a_slot_is_our_bug() -> None:
    with pytest.raises(AssertionError, match=r"layer 1: experts \[1\] have no slot"):
        Placement(np.array([[[0, 1]], [[0, 0]]], np.int32), 2)
    with pytest.raises(AssertionError, match="layer 0: expert 5 of 2"):
        Placement(np.array([[[0, 1, 5]]], np.int32), 2)


def test_ranges_name_layers_ranks_and_experts() -> None:
    assert contiguous(58, 256, 72).ranges().shape == (72, 5)
    assert contiguous(3, 8, 2).ranges().tolist() == [[0, 2, 0, 0, 3], [0, 2, 1, 4, 7]]
    experts_LWS = contiguous(4, 8, 2).experts_LWS.repeat(2, axis=2)  # every expert twice
    experts_LWS[2, 0, :2], experts_LWS[2, 1, [0, 2]] = (7, EMPTY), (0, 1)
    ranges = Placement(experts_LWS, 8).ranges().tolist()
    assert ranges[:2] == [[0, 1, 0, 0, 3], [0, 1, 1, 4, 7]]
    assert ranges[2:7] == [
        [2, 2, 0, 1, 3],
        [2, 2, 0, 7, 7],
        [2, 2, 1, 0, 1],
        [2, 2, 1, 4, 7],
        [3, 3, 0, 0, 3],
    ]
    assert Placement(np.zeros((0, 2, 3), np.int32), 8).ranges().shape == (0, 5)


@given(st.integers(0, 4), st.integers(1, 9), st.integers(1, 4), st.randoms())
def test_ranges_lose_no_expert(layers: int, experts: int, ranks: int, dice: random.Random) -> None:
    experts_LWS = contiguous(layers, experts, ranks).experts_LWS.copy()
    for layer in range(layers):
        if dice.random() < 0.5:
            flat = experts_LWS[layer].reshape(-1).tolist()
            dice.shuffle(flat)
            experts_LWS[layer] = np.array(flat).reshape(experts_LWS[layer].shape)
    found = {
        (layer, rank, expert)
        for first, last, rank, low, high in Placement(experts_LWS, experts).ranges().tolist()
        for layer in range(first, last + 1)
        for expert in range(low, high + 1)
    }
    assert found == {
        (layer, rank, int(experts_LWS[layer, rank, slot]))
        for layer, rank, slot in np.argwhere(experts_LWS != EMPTY).tolist()
    }


def test_a_pipeline_stage_may_hold_no_moe_layer() -> None:
    """Its dispatcher, moves and ranges are those of any other stage."""
    empty = contiguous(0, 8, 2)
    assert empty.homes_LE.shape == (0, 8)
    assert empty.ranges().shape == (0, 5)
    balanced = balance(np.zeros((0, 8)), empty)
    assert balanced.placement.num_layers == 0
    assert not len(balanced.moves)
