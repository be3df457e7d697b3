"""The contract between a rank's loop and its executor."""

from __future__ import annotations

from typing import Protocol

from ..protocol.bulk import RankHello
from ..protocol.plan import StepPlan
from ..protocol.results import StepResult
from ..protocol.timeline import StepSpans


class ControllerLost(RuntimeError):
    """The controller is gone and has not come back within the deadline."""


class StepFailed(RuntimeError):
    """A step could not be executed; the message holds the cause."""


class StepAbandoned(RuntimeError):
    """A collective of the step failed because a peer is gone. This rank is alive and waits for the
    next epoch.
    """


class StepExecutor(Protocol):
    """Executes plans: the model on this rank, or a simulation of it. Plans come in order."""

    def hello(self) -> RankHello: ...

    def published(self) -> tuple[bytes, bytes]:
        """Pages that hold whole blocks, and their hashes, as in ``Section.publish_i32``."""
        ...

    def begin_epoch(self, epoch: int, vacant: tuple[int, ...]) -> None:
        """Meets the other ranks; ``vacant`` as in ``Header``. Raises StepAbandoned when they do not
        come.
        """
        ...

    def end_epoch(self) -> None:
        """Leaves the communicator of the epoch: peers that wait in it give up."""
        ...

    def place(self, version: int, placement_i32: bytes) -> None:
        """Loads the experts of the placement after the moves ``version``. Raises ValueError if the
        checkpoint cannot be read.
        """
        ...

    def stage(self, staged: int, tokens_i32: bytes, grammar: str, num_emitted: int) -> bool:
        """Takes a prompt. False when its grammar has to compile first; see ``take_compiled``."""
        ...

    def unstage(self, staged: int) -> None: ...

    @property
    def phases_entered(self) -> int:
        """Phases of layers that were entered since the start; any thread may ask."""
        ...

    @property
    def compiling(self) -> bool:
        """Whether grammars of staged prompts are being compiled."""
        ...

    def take_compiled(self) -> list[tuple[int, str]]:
        """Prompts whose grammars have been compiled since the last call, with an error where that
        failed.
        """
        ...

    def submit(self, plan: StepPlan) -> None:
        """Begins a step. On a device it may be under way when this returns, and the next one may be
        begun; a host computes it here. Raises StepAbandoned when a peer is lost.
        """
        ...

    def take(self) -> StepResult | None:
        """The result of the oldest step that was begun and not taken yet, once it is done; None
        before that. Raises StepAbandoned when a peer is lost.
        """
        ...

    def take_spans(self) -> StepSpans | None:
        """Spans of the last step taken if its plan asked for them, once."""
        ...
