"""Turns of two microbatches: their order, their results, and the end of both where one fails."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lockstep.parallel.microbatches import Turns


def test_a_turn_ends_where_it_is_given_away() -> None:
    turns, said = Turns(), []

    def microbatch(name: str, waits: int) -> Callable[[], str]:
        def compute() -> str:
            for number in range(waits):
                said.append(f"{name}{number}")
                turns.give()
            said.append(f"{name} ends")
            return name

        return compute

    assert turns.run(microbatch("a", 2), microbatch("b", 2)) == ("a", "b")
    assert said == ["a0", "b0", "a1", "b1", "a ends", "b ends"]
    said.clear()
    assert turns.run(microbatch("a", 0), microbatch("b", 2)) == ("a", "b")
    assert said == ["a ends", "b0", "b1", "b ends"], "nobody is left to take the turn"
    said.clear()
    assert turns.run(microbatch("a", 3), microbatch("b", 1)) == ("a", "b")
    assert said == ["a0", "b0", "a1", "b ends", "a2", "a ends"]


def test_nothing_happens_without_another_microbatch() -> None:
    Turns().give()


@pytest.mark.parametrize("failing", ["a", "b"])
def test_an_exception_ends_both(failing: str) -> None:
    turns, said = Turns(), []

    def microbatch(name: str) -> Callable[[], None]:
        def compute() -> None:
            try:
                for number in range(3):
                    said.append(f"{name}{number}")
                    turns.give()
                    if name == failing and number == 1:
                        raise ConnectionError("a peer is gone")
                said.append("never")
            finally:
                if name != failing:
                    turns.give()  # nobody takes it any more
                said.append(f"{name} is over")

        return compute

    with pytest.raises(ConnectionError, match="a peer is gone"):
        turns.run(microbatch("a"), microbatch("b"))
    other = "b" if failing == "a" else "a"
    assert said[-1] == f"{other} is over" and said.count(f"{failing} is over") == 1 and "never" not in said
    length = len(said)
    assert turns.run(lambda: 1, lambda: 2) == (1, 2), "the next step has turns of its own"
    assert len(said) == length, "what was left is never resumed"
