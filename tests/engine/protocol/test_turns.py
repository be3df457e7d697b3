"""Standstills of the own process."""

from __future__ import annotations

from lockstep.engine.protocol.turns import LONGEST_TURN, SETTLED_SECONDS, Turns


def test_a_standstill_is_told_once_and_silence_is_judged_only_after_a_while() -> None:
    turns = Turns(10.0)
    assert turns.take(10.5) == 0.0 and turns.settled(10.5)
    assert turns.take(10.5 + LONGEST_TURN) == 0.0
    assert turns.take(33.0) == 33.0 - 10.5 - LONGEST_TURN
    assert not turns.settled(33.0) and turns.take(33.5) == 0.0
    assert not turns.settled(33.0 + SETTLED_SECONDS - 0.1) and turns.settled(33.0 + SETTLED_SECONDS)
