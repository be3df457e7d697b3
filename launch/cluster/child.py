"""A process in an interpreter of its own: own session, spec on standard input, output in a log."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Mapping

from ..environment import child_environment
from .cluster import Task
from .process import Process, exit_status, open_log


def run_child(task: Task, settings: Mapping[str, str], process: Process) -> None:
    """Starts ``task`` with ``settings`` in its environment and waits for its end.

    On Linux the child dies with the thread that starts it (``entry.leave_with_parent``), so that
    thread stays.
    """
    command = [sys.executable, "-P", "-m", task.module, task.role, str(task.index), str(os.getpid())]
    try:
        with os.fdopen(open_log(process.log), "ab") as output:
            child = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=process.log.parent,
                env=child_environment(settings),
                start_new_session=True,
            )
    except OSError as error:
        process.start_failed(error)
        return
    process.started.set_result(child.pid)
    assert child.stdin is not None
    with contextlib.suppress(BrokenPipeError), child.stdin:  # it may have died already
        child.stdin.write(task.spec)
    code = exit_status(child.pid)
    assert code is not None
    process.end(code, child.wait)
