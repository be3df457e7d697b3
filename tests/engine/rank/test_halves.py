"""The halves of a step: every token once, in the bounds, alike in time, and prompts in order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st

from lockstep.engine.protocol.buckets import most_tokens
from lockstep.engine.protocol.slot_table import Rows
from lockstep.engine.rank.halves import Part, halves, whole


def rows(decodes: list[int], chunks: list[tuple[int, int]]) -> Rows:
    """Rows that decode at these lengths, and chunks of prompts (start, count)."""
    starts = np.array([*decodes, *(start for start, _ in chunks)], np.int64)
    counts = np.array([*[1] * len(decodes), *(count for _, count in chunks)], np.int64)
    return Rows(np.arange(len(starts)), starts, counts, np.ones(len(starts), np.bool_), len(decodes))


def seconds(part: Part, kv_share: float) -> float:
    spent = part.counts + kv_share * (part.counts * part.starts + part.counts * (part.counts - 1) / 2)
    return float(spent.sum())


@given(
    decodes=st.lists(st.integers(1, 5000), max_size=40),
    chunks=st.lists(st.tuples(st.integers(0, 3000), st.integers(1, 300)), max_size=5),
    room=st.integers(0, 200),
    kv_share=st.sampled_from([0.0, 1e-4, 1e-2, 1.0]),
)
def test_every_token_is_in_one_half_and_no_half_is_too_large(
    decodes: list[int], chunks: list[tuple[int, int]], room: int, kv_share: float
) -> None:
    step = rows(decodes, chunks)
    num_tokens = int(step.counts.sum())
    most = most_tokens(num_tokens + room)
    pair = halves(step, most, kv_share)
    assert sorted(np.concatenate([part.tokens for part in pair]).tolist()) == list(range(num_tokens))
    computed: dict[int, list[tuple[int, int]]] = {}
    firsts = step.counts.cumsum() - step.counts
    for part in pair:
        assert part.counts.sum() == len(part.tokens) <= most and (part.counts > 0).all()
        assert (part.rows[: part.num_decode] < len(decodes)).all()
        assert (part.rows[part.num_decode :] >= len(decodes)).all()
        assert (part.counts[: part.num_decode] == 1).all()
        expected = [
            firsts[row] + start - step.starts[row] + offset
            for row, start, count in zip(part.rows, part.starts, part.counts, strict=True)
            for offset in range(count)
        ]
        assert part.tokens.tolist() == expected
        for row, start, count in zip(
            part.rows.tolist(), part.starts.tolist(), part.counts.tolist(), strict=True
        ):
            computed.setdefault(row, []).append((start, start + count))
    for row, spans in computed.items():
        assert spans[0][0] == step.starts[row] and spans[-1][1] == step.ends[row]
        assert len(spans) == 1 or spans[0][1] == spans[1][0], "the first half has the first part of a prompt"


@pytest.mark.parametrize(
    ("decodes", "chunks"),
    [
        ([10] * 16, []),
        ([4000, 10, 10, 10, 10, 10, 10, 4000], []),
        ([], [(0, 1000)]),
        ([], [(0, 100), (0, 100), (0, 800)]),
        ([2000] * 8, [(0, 400), (800, 200)]),
    ],
    ids=["alike", "two long rows", "one prompt", "short and long prompts", "both"],
)
def test_halves_take_equally_long(decodes: list[int], chunks: list[tuple[int, int]]) -> None:
    step = rows(decodes, chunks)
    first, second = halves(step, most_tokens(int(step.counts.sum())), 1e-3)
    assert seconds(first, 1e-3) == pytest.approx(seconds(second, 1e-3), rel=0.02)


def test_time_counts_and_not_rows() -> None:
    step = rows([8000, *[10] * 9], [])
    first, second = halves(step, 10, 1e-3)
    assert sorted((len(first.rows), len(second.rows))) == [5, 5], "rows that decode are dealt in pairs"
    step = rows([4000, 4000], [(0, 16)])
    first, second = halves(step, 18, 1e-2)
    assert first.num_decode == second.num_decode == 1
    first, second = halves(rows([], [(0, 100), (8000, 10)]), 110, 1e-1)
    assert len(first.tokens) > 100 and len(second.tokens) < 10, "few tokens with a long context take longer"


def test_a_step_may_have_no_rows_or_one() -> None:
    for step in (rows([], []), rows([7], []), rows([], [(0, 1)])):
        first, second = halves(step, most_tokens(2), 1e-3)
        assert len(first.tokens) + len(second.tokens) == int(step.counts.sum()) == len(whole(step).tokens)
