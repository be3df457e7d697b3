"""The token log against lists."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings, strategies as st

from lockstep.engine.planner.token_log import TokenLog


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.one_of(st.integers(0, 3), st.lists(st.integers(0, 200), min_size=4, max_size=4)), max_size=30)
)
def test_agrees_with_lists(script: list[int | list[int]]) -> None:
    """An int clears that row; four counts append that many tokens to the rows."""
    log, model, token = TokenLog(4), [[] for _ in range(4)], 0
    for item in script:
        if isinstance(item, int):
            log.clear(np.array([item]))
            model[item] = []
            continue
        tokens = np.arange(token, token + sum(item), dtype=np.int32)
        log.append_ragged(np.arange(4), np.array(item), tokens)
        for row, count in enumerate(item):
            model[row] += range(token, token + count)
            token += count
        assert [np.frombuffer(own, np.int32).tolist() for own in log.read(np.arange(4))] == model
        assert log.count.tolist() == [len(own) for own in model]


def test_a_cleared_row_gives_its_chunks_back() -> None:
    log = TokenLog(2)
    for _ in range(100):
        log.append_ragged(np.array([0, 1]), np.array([500, 300]), np.zeros(800, np.int32))
        log.clear(np.array([0, 1]))
    assert len(log._pool) <= 64 * 128
