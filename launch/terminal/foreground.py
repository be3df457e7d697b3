"""The process the user sees, apart from the launcher proper.

A terminal, ``timeout`` and service managers signal a whole process group, Ray's own processes
included, which would take Ray away before anything has drained. So the launcher and all below it
run in a session of their own, and the process that was started only passes signals on and waits.
"""

from __future__ import annotations

import contextlib
import os
import signal
from types import FrameType

from ..cluster.entry import leave_with_parent
from .interrupts import TERMINATE

_PASSED_ON = {signal.SIGINT: signal.SIGINT, signal.SIGTERM: TERMINATE, signal.SIGHUP: TERMINATE}


def step_behind() -> None:
    """Forks. Returns in the child, which leads a session of its own and dies with its parent; the
    parent stays here and leaves with the child's exit status. To be called before there are
    threads.
    """
    parent = os.getpid()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)
    child = os.fork()
    if child == 0:
        os.setsid()
        leave_with_parent(parent)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return

    def pass_on(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, _PASSED_ON[signal.Signals(number)])

    for number in _PASSED_ON:
        signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    os._exit(code if code >= 0 else 128 - code)
