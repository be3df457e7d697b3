"""Who hangs, told from who abandoned and who is silent."""

from __future__ import annotations

from lockstep.engine.controller.hang_detector import GRACE, Judgement, Vigil


def test_the_silent_one_among_those_that_abandoned_hangs() -> None:
    vigil = Vigil(60.0)
    vigil.abandoned(0, 100.0)
    vigil.abandoned(2, 100.1)
    assert vigil.judge(100.0 + GRACE / 2, [0, 1, 2], 61.0, 1.0) == Judgement()
    assert vigil.judge(100.0 + GRACE, [0, 1, 2], 63.0, 1.0) == Judgement((1,))


def test_when_all_abandoned_they_regroup() -> None:
    vigil = Vigil(60.0)
    for rank in range(3):
        vigil.abandoned(rank, 5.0)
    assert vigil.judge(5.0 + GRACE, [0, 1, 2], 65.0, 1.0) == Judgement(regroup=True)
    vigil.reset()
    assert vigil.judge(6.0 + GRACE, [], 0.0, 1.0) == Judgement()


def test_a_rank_that_answered_does_not_hang() -> None:
    vigil = Vigil(60.0)
    vigil.abandoned(0, 5.0)
    assert vigil.judge(5.0 + GRACE, [0], 70.0, 1.0) == Judgement(regroup=True)


def test_slow_is_not_hung() -> None:
    vigil = Vigil(60.0)
    assert vigil.judge(1000.0, [0, 1], 60.0, 1.0) == Judgement()
    assert vigil.judge(1000.0, [0, 1], 90.0, 20.0) == Judgement()
    assert vigil.judge(1000.0, [0, 1], 101.0, 20.0) == Judgement((0, 1))
