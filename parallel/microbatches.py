"""Two microbatches of a step in one thread: one computes while data of the other travel.

Each runs in a greenlet of its own and gives the turn away where it would wait. Turns follow from
the calls alone, so ranks that make the same calls start their collectives in the same order. What a
thread holds (grad mode, streams, profiler ranges) both share: no context manager is open where the
turn is given away.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from greenlet import GreenletExit, getcurrent, greenlet

_T = TypeVar("_T")


class Turns:
    """The turns of two microbatches. The first is never behind the second: it gets to every place
    before it.
    """

    def __init__(self) -> None:
        self._pair: tuple[Any, ...] = ()

    def number_of(self, computation: greenlet) -> int:
        """0 or 1 for a microbatch under way, -1 for any other computation."""
        return self._pair.index(computation) if computation in self._pair else -1

    def give(self) -> None:
        """Gives the turn to the other microbatch, until that one gives it back or ends. Returns at
        once where there is no other.
        """
        if self._pair:
            first, second = self._pair
            other = second if getcurrent() is first else first
            if not other.dead:
                other.switch()

    def run(self, first: Callable[[], _T], second: Callable[[], _T]) -> tuple[_T, _T]:
        """Runs both. An exception of one ends the other where it gave its turn away, and is
        raised.
        """
        assert not self._pair, "two microbatches at a time"
        found: dict[int, _T] = {}

        def start(number: int, computation: Callable[[], _T]) -> greenlet:
            def compute() -> None:
                found[number] = computation()

            return greenlet(compute)

        pair = self._pair = start(0, first), start(1, second)
        try:
            while not all(microbatch.dead for microbatch in pair):
                next(microbatch for microbatch in pair if not microbatch.dead).switch()
        finally:
            self._pair = ()
            for microbatch in pair:
                if not microbatch.dead:
                    microbatch.throw(GreenletExit)
        return found[0], found[1]
