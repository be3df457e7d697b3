"""Separates the process that the user started from the launcher.

A terminal, ``timeout`` and service managers signal a whole process group, Ray's own processes
included, which would end Ray before requests have drained. So the launcher and all its children
run in a session of their own; the process that was started passes signals on and waits.
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
    """Forks. Returns in the child, which leads a new session and dies with its parent.

    The parent stays here and exits with the child's status. Call it before threads exist.
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
