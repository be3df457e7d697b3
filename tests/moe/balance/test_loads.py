"""The window of loads, and when balancing is due."""

from __future__ import annotations

import numpy as np
import pytest

from lockstep.moe.balance.loads import LoadWindow, Trigger
from lockstep.moe.balance.placement import contiguous


def test_the_window_reaches_back_until_it_holds_tokens_enough() -> None:
    window = LoadWindow(2, 2, 2, least_tokens=100)  # in the mean of layers
    for _ in range(30):
        window.add(np.array([[10, 0], [10, 0]]))
    assert window.loads_LE.sum() == 2 * 100, "ten reports"
    window.add(np.array([[0, 95], [0, 95]]))
    assert window.loads_LE.tolist() == [[10, 95], [10, 95]], "two reports have enough"
    for _ in range(30):
        window.add(np.array([[1, 0], [1, 0]]))
    assert window.loads_LE.sum() == 2 * 16, "no more than 16 reports"


@pytest.mark.parametrize(("ranks", "tokens"), [(2, 3082), (4, 12324), (72, 684_288)])
def test_balancing_waits_for_tokens_that_chance_tilts_by_no_more_than_the_drift(
    ranks: int, tokens: int
) -> None:
    trigger, placement = Trigger(), contiguous(1, ranks, ranks)
    assert trigger.least_tokens(ranks) == tokens
    shares_E = np.ones(ranks)
    shares_E[:2] = 1.1, 0.9
    loads_LE = tokens / ranks * shares_E[None]
    assert trigger.due(loads_LE, placement, 1.06) and not trigger.due(loads_LE, placement, 1.07)
    assert not trigger.due(0.99 * loads_LE, placement, 1.06)
    if ranks > 2:
        chance = np.random.default_rng(0).multinomial(tokens, np.full(ranks, 1 / ranks), size=20)
        assert np.mean([trigger.due(counts_E[None], placement, 1.0) for counts_E in chance]) < 0.3
