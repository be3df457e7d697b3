"""The chain of plans as a rank follows it: each names its predecessor, and only the next one is
executed.
"""

from __future__ import annotations

from enum import Enum

from .plan import StepPlan


class Verdict(Enum):
    """What to do with a plan: execute it, refuse it because of a gap, or ignore it as executed,
    abandoned or of an old epoch.
    """

    NEXT = 1
    GAP = 2
    OLD = 3


class Chain:
    """Where a rank stands in its group's sequence of (epoch, step)."""

    def __init__(self) -> None:
        self.epoch = -1
        self.last_step = -1
        self._abandoned = False

    def judge(self, plan: StepPlan) -> Verdict:
        """A rebase may be executed whatever came before; nothing of an abandoned epoch may."""
        header = plan.header
        if header.epoch < self.epoch or (
            header.epoch == self.epoch and (header.step <= self.last_step or self._abandoned)
        ):
            return Verdict.OLD
        follows = header.epoch == self.epoch and header.predecessor == self.last_step
        return Verdict.NEXT if follows or plan.section.rebase else Verdict.GAP

    def enter(self, epoch: int) -> bool:
        """Whether a plan of ``epoch`` opens it."""
        opens = epoch != self.epoch
        if opens:
            self.epoch, self._abandoned = epoch, False
        return opens

    def executed(self, step: int) -> None:
        self.last_step = step

    def abandon(self) -> None:
        """The step in hand cannot be completed: wait for the next epoch."""
        self._abandoned = True
