"""Ranks with parts of the vocabulary choose the tokens that one rank chooses by all logits, and few
numbers of them travel where those decide.
"""

from __future__ import annotations

import pytest

from support.engine.rank.split_rows import ROWS, choose_in_parts, facts_of_parts
from support.parallel.gloo_ranks import run_ranks

FEW = [
    row
    for row, each in enumerate(ROWS)
    if each.repetition_penalty == 1
    and (each.top_k in range(1, 51) or (each.top_k == 0 and each.top_p == 1 and not each.min_p))
]


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("kind", ["even", "ties", "far apart", "forbidden"])
def test_tokens_and_log_probabilities_are_those_of_one_rank(kind: str, size: int) -> None:
    by_rank = run_ranks(choose_in_parts, size, kind, range(len(ROWS)))
    expected = by_rank[0][1]
    for rank, (found, alone, _) in enumerate(by_rank):
        assert alone == expected, "the same logits everywhere"
        assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected], f"rank {rank}"
    assert by_rank[0][0] == expected


def test_whole_logits_stay_where_candidates_decide() -> None:
    for kind, travels in (("even", False), ("far apart", False), ("ties", True)):
        for found, alone, most in run_ranks(choose_in_parts, 2, kind, FEW):
            assert found == alone
            assert (most > 2 * 51) == travels, f"{kind}: {most} columns"


def test_ranks_of_tokens_are_counted_part_by_part() -> None:
    for found, expected in run_ranks(facts_of_parts, 3):
        assert found == expected
