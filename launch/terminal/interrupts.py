"""SIGTERM and Ctrl-C: the first asks for an orderly end, the second for an immediate one."""

from __future__ import annotations

import signal
from types import FrameType

# Used in place of SIGTERM, whose handler ray.init replaces; SIGTERM aborts parts of it.
TERMINATE = signal.SIGUSR2
_MEANING = {signal.SIGINT: "SIGINT", signal.SIGTERM: "SIGTERM", TERMINATE: "SIGTERM"}


class Interrupted(Exception):
    """A request to stop before the cluster was ready."""


class Interrupts:
    """Counts the signals that ask to stop. The second raises KeyboardInterrupt in the main thread,
    unless ``muted``.
    """

    def __init__(self) -> None:
        self.count = 0
        self.name = ""
        self.muted = False

    def install(self) -> None:
        """Sets the handlers; call it again after ray.init, which sets its own for SIGTERM."""
        for number in _MEANING:
            signal.signal(number, self._count)

    def check(self) -> None:
        """Raises Interrupted once a signal has come."""
        if self.count:
            raise Interrupted(self.name)

    def _count(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        self.name = self.name or _MEANING[signal.Signals(number)]
        if self.count > 1 and not self.muted:
            raise KeyboardInterrupt
