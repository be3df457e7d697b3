"""Hung ranks are told from those that abandoned their step and from slow ones."""

from __future__ import annotations

from lockstep.engine.controller.hang_detector import GRACE, HangDetector, Judgement


def test_the_only_rank_that_did_not_abandon_hangs() -> None:
    detector = HangDetector(60.0)
    detector.abandoned(0, 100.0)
    detector.abandoned(2, 100.1)
    assert detector.judge(100.0 + GRACE / 2, [0, 1, 2], 61.0, 1.0) == Judgement()
    assert detector.judge(100.0 + GRACE, [0, 1, 2], 63.0, 1.0) == Judgement((1,))


def test_ranks_regroup_when_all_abandoned() -> None:
    detector = HangDetector(60.0)
    for rank in range(3):
        detector.abandoned(rank, 5.0)
    assert detector.judge(5.0 + GRACE, [0, 1, 2], 65.0, 1.0) == Judgement(regroup=True)
    detector.reset()
    assert detector.judge(6.0 + GRACE, [], 0.0, 1.0) == Judgement()


def test_a_rank_that_answered_does_not_hang() -> None:
    detector = HangDetector(60.0)
    detector.abandoned(0, 5.0)
    assert detector.judge(5.0 + GRACE, [0], 70.0, 1.0) == Judgement(regroup=True)


def test_slow_is_not_hung() -> None:
    detector = HangDetector(60.0)
    assert detector.judge(1000.0, [0, 1], 60.0, 1.0) == Judgement()
    assert detector.judge(1000.0, [0, 1], 90.0, 20.0) == Judgement()
    assert detector.judge(1000.0, [0, 1], 101.0, 20.0) == Judgement((0, 1))
