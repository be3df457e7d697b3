"""A child process: own session, spec on standard input, output in a log file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from ..environment import child_environment
from .cluster import Task

TAIL_BYTES = 4096


class Child:
    """Starts ``task`` and owns its process.

    On Linux the child dies with the thread that constructs it (``entry.leave_with_parent``), so
    construct it in a thread that stays.
    """

    def __init__(self, task: Task, log_dir: Path) -> None:
        self.log = log_dir / f"{task.role}-{task.index}.log"
        command = [sys.executable, "-P", "-m", task.module, task.role, str(task.index), str(os.getpid())]
        own = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(own, "ab") as output:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=log_dir,
                env=child_environment(dict(task.environment)),
                start_new_session=True,
            )
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(task.spec)
            self.process.stdin.close()
        except BrokenPipeError:
            pass  # it has died already; deaths() will report it

    @property
    def pid(self) -> int:
        return self.process.pid

    def tail(self) -> str:
        """The last lines of the log."""
        with self.log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            return file.read().decode(errors="replace")

    def signal(self, number: int) -> None:
        """Signals the process group; the pid cannot be reused before ``poll`` sees the end."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)

    def kill(self) -> int:
        """Kills it and waits; returns the exit status."""
        self.signal(signal.SIGKILL)
        return self.process.wait()
