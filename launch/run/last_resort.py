"""A time limit for shutdown steps that wait for other processes."""

from __future__ import annotations

import os
import sys
import threading
from types import TracebackType


class LastResort:
    """Ends this process with status 1 if the block takes more than ``seconds``.

    The reaper then kills the rest of the run.
    """

    def __init__(self, seconds: float, step: str) -> None:
        self._message = f"error: {step} took more than {seconds:g} s; leaving, and killing what is left\n"
        self._timer = threading.Timer(seconds, self._leave)
        self._timer.daemon = True

    def _leave(self) -> None:
        sys.stderr.write(self._message)
        sys.stderr.flush()
        os._exit(1)

    def __enter__(self) -> LastResort:
        self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
