"""The chain of plans on a rank: each plan names its predecessor, and only the next is executed."""

from __future__ import annotations

from enum import Enum

from .plan import StepPlan


class Verdict(Enum):
    """The answer to a plan: execute it, refuse it because of a gap, or ignore it as executed,
    abandoned or of an old epoch.
    """

    NEXT = 1
    GAP = 2
    OLD = 3


class Chain:
    """A rank's position in its group's sequence of (epoch, step)."""

    def __init__(self) -> None:
        self.epoch = -1
        self.last_step = -1
        self._abandoned = False

    def judge(self, plan: StepPlan) -> Verdict:
        """Judges a plan. A rebase needs no predecessor; plans of an abandoned epoch are old."""
        header = plan.header
        if header.epoch < self.epoch or (
            header.epoch == self.epoch and (header.step <= self.last_step or self._abandoned)
        ):
            return Verdict.OLD
        follows = header.epoch == self.epoch and header.predecessor == self.last_step
        return Verdict.NEXT if follows or plan.section.rebase else Verdict.GAP

    def enter(self, epoch: int) -> bool:
        """Enters the epoch of a plan. Returns whether it is a new one."""
        opens = epoch != self.epoch
        if opens:
            self.epoch, self._abandoned = epoch, False
        return opens

    def executed(self, step: int) -> None:
        self.last_step = step

    def abandon(self) -> None:
        """The current step cannot be completed: only another epoch continues."""
        self._abandoned = True
