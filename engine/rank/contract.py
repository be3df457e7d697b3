"""The contract between a rank's loop and its executor."""

from __future__ import annotations

from typing import Protocol

from ..protocol.bulk import RankHello
from ..protocol.plan import StepPlan
from ..protocol.results import StepResult


class ControllerLost(RuntimeError):
    """The controller has gone away and has not come back within the deadline."""


class StepFailed(RuntimeError):
    """A step could not be executed; the message holds the cause."""


class StepAbandoned(RuntimeError):
    """An exchange of the step did not complete because a peer is gone: this rank is well and waits
    for the next epoch.
    """


class StepExecutor(Protocol):
    """What executes plans: the model on this rank, or a simulation of it. Plans come in the order
    of their chain.
    """

    def hello(self) -> RankHello: ...

    def begin_epoch(self, epoch: int) -> None:
        """Meets the other ranks. Raises StepAbandoned when they do not come."""
        ...

    def stage(self, staged: int, tokens_i32: bytes, grammar: str, num_emitted: int) -> bool:
        """Takes a prompt. False when ``take_compiled`` will say when it can be admitted."""
        ...

    def unstage(self, staged: int) -> None: ...

    @property
    def compiling(self) -> bool:
        """Whether grammars of staged prompts are being compiled."""
        ...

    def take_compiled(self) -> list[tuple[int, str]]:
        """Preloaded prompts whose grammars are compiled since the last call, with the error where that
        failed.
        """
        ...

    def execute(self, plan: StepPlan) -> StepResult:
        """Raises StepAbandoned when a peer is lost in the middle."""
        ...
