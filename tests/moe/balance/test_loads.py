"""Loads over a window, and the drift that makes balancing due."""

from __future__ import annotations

import numpy as np
import pytest

from lockstep.moe.balance.balance import Limits, balance
from lockstep.moe.balance.loads import LoadWindow, Trigger, weighted_imbalance
from lockstep.moe.balance.placement import contiguous


def test_a_window_is_the_sum_of_its_last_reports() -> None:
    window = LoadWindow(1, 2, num_reports=2)
    counts_LE = np.zeros((1, 2), np.int64)
    for report, full in (([10, 0], False), ([1, 5], False), ([3, 5], True)):
        assert window.is_full == full
        counts_LE[:] = report  # the caller's array may change
        window.add(counts_LE)
    assert window.loads_LE.tolist() == [[4, 10]]


def test_balancing_is_due_after_a_drift_and_not_right_after_a_balance() -> None:
    dice, trigger = np.random.default_rng(2), Trigger(drift=0.05, least_tokens=100)
    loads_LE = np.round(1000 * dice.lognormal(0, 1, (4, 32)))
    placement = contiguous(4, 32, 4)
    assert trigger.due(loads_LE, placement, 1.0)
    assert not trigger.due(loads_LE / 1000, placement, 1.0), "too few tokens to judge by"
    balanced = balance(loads_LE, placement, Limits(target=1.02)).placement
    reached = weighted_imbalance(loads_LE, balanced)
    assert not trigger.due(loads_LE, balanced, reached)
    assert not trigger.due(loads_LE * dice.lognormal(0, 0.005, (4, 32)), balanced, reached)
    assert trigger.due(loads_LE * dice.lognormal(0, 0.5, (4, 32)), balanced, reached)


def test_layers_count_by_their_load() -> None:
    placement = contiguous(2, 2, 2)
    assert weighted_imbalance(np.array([[3.0, 1.0], [300.0, 300.0]]), placement) == pytest.approx(
        1.0033, abs=1e-3
    )
    assert weighted_imbalance(np.zeros((2, 2)), placement) == 1.0
