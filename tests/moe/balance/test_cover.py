"""Placements for ranks that go on without others."""

from __future__ import annotations

import numpy as np
import pytest

from lockstep.moe.balance.cover import cover
from lockstep.moe.balance.placement import Placement, contiguous
from lockstep.moe.balance.start import starting_placement

LAYERS, EXPERTS, RANKS = 6, 32, 8


def _loads() -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    return np.random.default_rng(3).lognormal(3, 1, (LAYERS, EXPERTS))


@pytest.mark.parametrize("vacant", [(3,), (0, 7), (2, 5, 6)])
@pytest.mark.parametrize("stages", [[slice(0, LAYERS)], [slice(0, 2), slice(2, LAYERS)]])
def test_every_expert_has_a_slot_elsewhere_and_little_changes(
    vacant: tuple[int, ...], stages: list[slice]
) -> None:
    before = starting_placement(LAYERS, EXPERTS, RANKS, 32, _loads())
    after = cover(before, _loads(), stages, vacant)
    vacancies = list(vacant)
    present = [rank for rank in range(RANKS) if rank not in vacant]
    assert (after.experts_LWS[:, vacancies] == before.experts_LWS[:, vacancies]).all(), "they come back"
    Placement(after.experts_LWS[:, present], EXPERTS)  # asserts that every expert is there
    changed_L = (after.experts_LWS != before.experts_LWS).sum(axis=(1, 2))
    lost_L = [len(set(range(EXPERTS)) - set(layer[present].ravel().tolist())) for layer in before.experts_LWS]
    assert changed_L.tolist() == lost_L, "only experts that were lost are placed anew"


def test_replicas_everywhere_need_no_change() -> None:
    before = starting_placement(LAYERS, EXPERTS, 2, EXPERTS)
    after = cover(before, np.zeros((LAYERS, EXPERTS)), [slice(0, LAYERS)], (1,))
    assert (after.experts_LWS == before.experts_LWS).all()


def test_too_few_slots_are_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match="7 ranks of 4 expert slots cannot hold 32 experts"):
        cover(contiguous(LAYERS, EXPERTS, RANKS), _loads(), [slice(0, LAYERS)], (3,))
