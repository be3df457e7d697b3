"""Detects hung ranks: those that neither answer a step nor move in it, nor report abandoning it.

When a rank stops in the middle of a step, the others wait for it in a collective until their
deadline, abandon the step and report that. Slow is not hung: a rank that takes long tells of its
progress, and only one that stands still is judged, after a deadline.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

GRACE = 3.0
"""Seconds from the first report of an abandoned step to a judgement. By then a death is reported,
and the other survivors have abandoned the step too."""

STALLED_SECONDS = 10.0
"""Seconds of standing still after which health tells of it."""

_BEYOND = 15.0
"""Seconds of standing still allowed beyond the collective deadline."""


@dataclass(frozen=True)
class Judgement:
    """``hung`` ranks are to be killed. ``regroup``: no rank hangs, and all wait for a new epoch.
    ``stalled`` ranks have stood still for a while.
    """

    hung: tuple[int, ...] = ()
    regroup: bool = False
    stalled: tuple[int, ...] = ()


class HangDetector:
    """Watches one epoch. Ranks wait ``collective_deadline`` seconds in a collective. ``cold`` ranks
    have answered no step since they joined: they may be compiling, and have ``cold_deadline``
    seconds. Times are monotonic seconds.
    """

    def __init__(self, collective_deadline: float, cold_deadline: float) -> None:
        self._collective_deadline = collective_deadline
        self._cold_deadline = max(cold_deadline, collective_deadline + _BEYOND)
        self.cold: set[int] = set()
        self._abandoned: set[int] = set()
        self._first = 0.0
        self._progress: dict[int, tuple[int, ...]] = {}
        self._moved_at: dict[int, float] = {}

    def reset(self) -> None:
        """A new epoch begins."""
        self._abandoned.clear()
        self._progress.clear()
        self._moved_at.clear()

    def stood_still(self, seconds: float) -> None:
        """The controller stood still for so long, and perhaps the ranks as well."""
        self._first += seconds
        self._moved_at = {rank: at + seconds for rank, at in self._moved_at.items()}

    def abandoned(self, rank: int, now: float) -> None:
        """A rank is alive and has abandoned its step."""
        if not self._abandoned:
            self._first = now
        self._abandoned.add(rank)

    def progressed(self, rank: int, progress: tuple[int, ...], now: float) -> None:
        """A rank tells how far it is; the same again is no progress."""
        if self._progress.get(rank) != progress:
            self._progress[rank] = progress
            self._moved_at[rank] = now

    def judge(self, now: float, behind: list[int], silent_for: float, predicted: float) -> Judgement:
        """Judges ``behind``, the ranks that owe a result, after ``silent_for`` seconds without a
        first result.

        A rank stands still since the last result or its last progress. Where others have abandoned
        the step it hangs when it stood still for half of the time that they waited. Otherwise, as
        in a group of one, which has no collective to abandon, it hangs after the deadline and five
        times the ``predicted`` seconds of its step.
        """
        if self._abandoned.issuperset(behind) and behind:
            return Judgement(regroup=True)
        patience = max(self._collective_deadline + _BEYOND, 5 * predicted)
        if self._abandoned:
            patience = self._collective_deadline / 2 if now - self._first >= GRACE else math.inf
        still = {
            rank: min(silent_for, now - self._moved_at.get(rank, -math.inf))
            for rank in behind
            if rank not in self._abandoned
        }
        hung = tuple(rank for rank, seconds in still.items() if seconds > self._patience_with(rank, patience))
        stalled = tuple(
            rank for rank, seconds in still.items() if seconds > STALLED_SECONDS and rank not in self.cold
        )
        return Judgement(hung, stalled=stalled)

    def _patience_with(self, rank: int, patience: float) -> float:
        return max(patience, self._cold_deadline) if rank in self.cold else patience
