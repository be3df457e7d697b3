"""Detects hung ranks: those that neither answer a step nor report abandoning it.

When a rank stops in the middle of a step, the others wait for it in a collective until their
deadline, abandon the step and report that. Slow is not hung: nothing is judged before a deadline
has passed.
"""

from __future__ import annotations

from dataclasses import dataclass

GRACE = 3.0
"""Seconds from the first report of an abandoned step to a judgement. By then a death is reported,
and the other survivors have abandoned the step too."""

_BEYOND = 15.0
"""Seconds of silence allowed beyond the collective deadline."""


@dataclass(frozen=True)
class Judgement:
    """``hung`` ranks are to be killed. ``regroup``: no rank hangs, and all wait for a new epoch."""

    hung: tuple[int, ...] = ()
    regroup: bool = False


class HangDetector:
    """Watches one epoch. Ranks wait ``collective_deadline`` seconds in a collective; times are
    monotonic seconds.
    """

    def __init__(self, collective_deadline: float) -> None:
        self._deadline = collective_deadline + _BEYOND
        self._abandoned: set[int] = set()
        self._first = 0.0

    def reset(self) -> None:
        """A new epoch begins."""
        self._abandoned.clear()

    def stood_still(self, seconds: float) -> None:
        """The controller stood still for so long, and perhaps the ranks as well."""
        self._first += seconds

    def abandoned(self, rank: int, now: float) -> None:
        """A rank is alive and has abandoned its step."""
        if not self._abandoned:
            self._first = now
        self._abandoned.add(rank)

    def judge(self, now: float, behind: list[int], silent_for: float, predicted: float) -> Judgement:
        """Judges ``behind``, the ranks that owe a result, after ``silent_for`` seconds without a
        first result.

        A group of one rank has no collective to abandon: it hangs when it is silent for longer than
        the deadline and five times the ``predicted`` seconds of its step.
        """
        if self._abandoned:
            if self._abandoned.issuperset(behind):
                return Judgement(regroup=True)
            if now - self._first < GRACE:
                return Judgement()
            hung = tuple(rank for rank in behind if rank not in self._abandoned)
            return Judgement(hung)
        silent = silent_for > max(self._deadline, 5 * predicted)
        return Judgement(tuple(behind)) if silent else Judgement()
