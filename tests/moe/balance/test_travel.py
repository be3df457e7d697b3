"""Bytes of experts on their way: as planned, and as the balancer cuts moves."""

from __future__ import annotations

import pytest

from lockstep.moe.balance.travel import experts_at_once, staged_bytes

MIB = 1 << 20


@pytest.mark.parametrize(
    ("expert_bytes", "together"), [(1, 16 * MIB), (4 * MIB, 4), (5 * MIB, 3), (17 * MIB, 1)]
)
def test_small_experts_travel_together(expert_bytes: int, together: int) -> None:
    assert experts_at_once(expert_bytes) == together


@pytest.mark.parametrize(
    ("expert_bytes", "num_slots", "num_layers", "experts"),
    [
        (42 * MIB, 4, 58, 4 * 4 + 4),  # a layer's travel together
        (4 * MIB, 2, 58, 4 * 4 + 4),  # those of two layers do
        (4 * MIB, 2, 3, 6 + 4),  # a rank has no more than six
        (1, 16, 4, 64 + 64),
        (MIB, 4, 0, 0),  # a stage of dense layers
    ],
)
def test_a_rank_holds_four_moves_and_what_it_sends(
    expert_bytes: int, num_slots: int, num_layers: int, experts: int
) -> None:
    assert staged_bytes(expert_bytes, num_slots, num_layers) == experts * expert_bytes
