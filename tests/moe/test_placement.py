"""Placement: every expert has a home, uneven splits included."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockstep.moe.placement import EMPTY, Placement, contiguous


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


def test_a_replicated_expert_is_at_home_in_its_first_slot() -> None:
    placement = Placement(np.array([[[EMPTY, 1], [0, 1]]], np.int32), 2)
    assert placement.homes_LE.tolist() == [[2, 1]]


def test_an_expert_without_a_slot_is_our_bug() -> None:
    with pytest.raises(AssertionError, match=r"layer 1: experts \[1\] have no slot"):
        Placement(np.array([[[0, 1]], [[0, 0]]], np.int32), 2)
    with pytest.raises(AssertionError, match="layer 0: expert 5 of 2"):
        Placement(np.array([[[0, 1, 5]]], np.int32), 2)
