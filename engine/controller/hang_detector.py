"""Who hangs: told from who has abandoned a step and who has said nothing.

When a rank stops in the middle of a step, the others wait for it in an exchange until its deadline,
abandon the step and say so. The one that neither answers nor abandons is the one that hangs. Slow
is not hung: until somebody's deadline has passed nothing is judged.
"""

from __future__ import annotations

from dataclasses import dataclass

GRACE = 3.0
"""Seconds after the first rank has abandoned a step: a death is reported by then, and the other survivors have abandoned it too."""

_BEYOND = 15.0


@dataclass(frozen=True)
class Judgement:
    """``hung`` ranks are to be killed; ``regroup``: all are well and wait for a new epoch."""

    hung: tuple[int, ...] = ()
    regroup: bool = False


class Vigil:
    """Watches one epoch. ``collective_deadline`` is what ranks allow an exchange; times are
    monotonic seconds.
    """

    def __init__(self, collective_deadline: float) -> None:
        self._deadline = collective_deadline + _BEYOND
        self._abandoned: set[int] = set()
        self._first = 0.0

    def reset(self) -> None:
        """A new epoch begins."""
        self._abandoned.clear()

    def abandoned(self, rank: int, now: float) -> None:
        """A rank is well and has given up the step in hand."""
        if not self._abandoned:
            self._first = now
        self._abandoned.add(rank)

    def judge(self, now: float, behind: list[int], silent_for: float, predicted: float) -> Judgement:
        """``behind`` are the ranks that owe a result, ``silent_for`` the seconds since the last
        first result.

        Where nobody abandons (a group of one has no exchange), silence counts beyond five times the
        ``predicted`` step.
        """
        if self._abandoned:
            if now - self._first < GRACE:
                return Judgement()
            hung = tuple(rank for rank in behind if rank not in self._abandoned)
            return Judgement(hung, regroup=not hung)
        return Judgement(tuple(behind)) if silent_for > max(self._deadline, 5 * predicted) else Judgement()
