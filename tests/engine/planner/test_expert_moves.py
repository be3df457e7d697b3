"""Moves of experts in plans: started one after another, committed at a border once all ranks of the
stage have them, dropped with their epoch, and said again where a rank may have missed a commit.
"""

from __future__ import annotations

import numpy as np
import pytest

from lockstep.engine.planner.expert_moves import ExpertMoves
from lockstep.engine.protocol.plan import Transfer
from lockstep.engine.protocol.results import StepResult
from lockstep.parallel.mesh import Mesh

TWO_STAGES = Mesh(pipeline=2, data=2)


def moves(number: int, stage: int = 0) -> Transfer:
    return Transfer(number, stage, np.array([(0, 1, 0, 1, 2)], np.int32).tobytes())


def result(rank: int, *landed: int) -> StepResult:
    return StepResult(0, 0, 0, rank, landed_i32=np.array(landed, np.int32).tobytes())


def plan(found: ExpertMoves, border: bool = False, first: bool = False) -> tuple[list[int], list[int]]:
    """Ids of the moves that a plan starts and of those it commits."""
    started, commits = found.plan(border=border, first=first)
    return [part.id for part in started], list(commits)


def test_moves_travel_one_after_another_and_are_committed_at_a_border() -> None:
    found = ExpertMoves(TWO_STAGES)
    found.offer([moves(1), moves(2, stage=1)])
    assert plan(found) == ([1], []) and plan(found, border=True) == ([], []), "nothing has landed"
    found.landed(result(0, 1))
    assert plan(found, border=True) == ([], []), "rank 1 has not named it"
    found.landed(result(2, 1))
    found.landed(result(3, 1))
    assert plan(found, border=True) == ([], []), "ranks 2 and 3 are of another stage"
    found.landed(result(1, 1))
    assert plan(found) == ([2], []) and found.num_open == 2
    found.landed(result(2, 2))
    found.landed(result(3, 2))
    assert plan(found, border=True) == ([], [1, 2])
    assert (found.num_open, found.committed) == (0, 2) and plan(found, border=True) == ([], [])


def test_ranks_hold_few_moves_at_once() -> None:
    found = ExpertMoves(Mesh(data=1))
    found.offer([moves(number) for number in range(1, 10)])
    started = []
    for _ in range(20):
        started += plan(found)[0]
        found.landed(result(0, *started))
    assert started == [1, 2, 3], "the others wait for a commit"
    assert plan(found, border=True) == ([4], [1, 2, 3])


def test_an_epoch_drops_moves_and_repeats_commits() -> None:
    found = ExpertMoves(Mesh(data=1), committed=7)
    found.offer([moves(8), moves(9), moves(10)])
    plan(found)
    found.landed(result(0, 8))
    assert plan(found, border=True) == ([9], [8])
    found.begin_epoch()
    assert (found.num_open, found.committed) == (0, 8)
    assert plan(found, first=True) == ([], [8]), "a rank may have missed the plan that said so"
    found.landed(result(0, 9))
    assert plan(found, border=True) == ([], []), "9 began in another epoch"
    found.offer([moves(11)])
    assert plan(found) == ([11], [])


def test_ids_rise() -> None:
    found = ExpertMoves(Mesh(data=1), committed=7)
    with pytest.raises(AssertionError, match="ids of moves rise"):
        found.offer([moves(7)])
