"""Hung ranks are told from those that abandoned their step, from slow and from cold ones."""

from __future__ import annotations

from lockstep.engine.controller.hang_detector import GRACE, STALLED_SECONDS, HangDetector, Judgement


def test_the_only_rank_that_did_not_abandon_hangs() -> None:
    detector = HangDetector(60.0, 300.0)
    detector.abandoned(0, 100.0)
    detector.abandoned(2, 100.1)
    assert detector.judge(100.0 + GRACE / 2, [0, 1, 2], 61.0, 1.0).hung == ()
    assert detector.judge(100.0 + GRACE, [0, 1, 2], 63.0, 1.0) == Judgement((1,), stalled=(1,))


def test_ranks_regroup_when_all_abandoned() -> None:
    detector = HangDetector(60.0, 300.0)
    for rank in range(3):
        detector.abandoned(rank, 5.0)
    assert detector.judge(5.0 + GRACE, [0, 1, 2], 65.0, 1.0) == Judgement(regroup=True)
    detector.reset()
    assert detector.judge(6.0 + GRACE, [], 0.0, 1.0) == Judgement()


def test_a_rank_that_answered_does_not_hang() -> None:
    detector = HangDetector(60.0, 300.0)
    detector.abandoned(0, 5.0)
    assert detector.judge(5.0 + GRACE, [0], 70.0, 1.0) == Judgement(regroup=True)


def test_slow_is_not_hung() -> None:
    detector = HangDetector(60.0, 300.0)
    assert not detector.judge(1000.0, [0, 1], 60.0, 1.0).hung
    assert not detector.judge(1000.0, [0, 1], 90.0, 20.0).hung
    assert detector.judge(1000.0, [0, 1], 101.0, 20.0).hung == (0, 1)


def test_a_rank_that_moves_does_not_hang_however_long_its_step_takes() -> None:
    """Alone, as in a group of one, and while others have given up waiting for it."""
    detector = HangDetector(60.0, 300.0)
    for second in range(2000):
        detector.progressed(0, (0, 7, second // 20), float(second))
        assert not detector.judge(float(second), [0], float(second), 1.0).hung
    detector.abandoned(1, 2000.0)
    assert not detector.judge(2000.0 + GRACE, [0, 1], 2000.0 + GRACE, 1.0).hung
    for second in range(2000, 2080):
        detector.progressed(0, (0, 7, 100), float(second))  # alive, and stands still
    assert detector.judge(2050.0, [0, 1], 2050.0, 1.0).hung == (0,)
    detector.reset()
    detector.progressed(0, (1, 8, 50), 2100.0)
    assert not detector.judge(2175.0, [0], 2175.0, 1.0).hung
    assert detector.judge(2175.1, [0], 2175.1, 1.0).hung == (0,)


def test_a_rank_that_has_answered_nothing_yet_may_be_compiling() -> None:
    detector = HangDetector(60.0, 300.0)
    detector.cold.add(1)
    assert detector.judge(1000.0, [0, 1], 100.0, 1.0).hung == (0,)
    assert detector.judge(1000.0, [0, 1], 299.0, 1.0).stalled == (0,)
    detector.abandoned(0, 1000.0)
    assert detector.judge(1000.0 + GRACE, [0, 1], 299.0, 1.0) == Judgement()
    assert detector.judge(1000.0 + GRACE, [0, 1], 300.1, 1.0).hung == (1,)
    detector.cold.discard(1)
    assert detector.judge(1000.0 + GRACE, [0, 1], 100.0, 1.0).hung == (1,)


def test_ranks_that_stand_still_for_a_while_are_told_and_not_judged() -> None:
    detector = HangDetector(60.0, 300.0)
    assert detector.judge(100.0, [0, 1], STALLED_SECONDS, 1.0) == Judgement()
    detector.progressed(1, (0, 3, 5), 95.0)
    assert detector.judge(100.0, [0, 1], STALLED_SECONDS + 1, 1.0) == Judgement(stalled=(0,))


def test_a_standstill_of_the_controller_is_none_of_the_ranks() -> None:
    detector = HangDetector(60.0, 300.0)
    detector.progressed(0, (0, 3, 5), 100.0)
    detector.stood_still(500.0)
    assert not detector.judge(660.0, [0], 1000.0, 1.0).hung
    detector.abandoned(1, 660.0)
    detector.stood_still(50.0)
    assert not detector.judge(711.0, [0, 1], 1000.0, 1.0).hung
