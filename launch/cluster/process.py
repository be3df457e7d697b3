"""A process of a cluster as seen by its parent: its id, its end, its log."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from .cluster import Task

TAIL_BYTES = 4096


class Process:
    """The process of ``task``, which writes to a log file in ``log_dir``.

    ``started`` gets its id and ``ended`` its exit status, negative for a signal; both get the
    exception where it could not be started. ``lost_with``: as in ``Death``. May be used from
    several threads.
    """

    def __init__(self, task: Task, log_dir: Path) -> None:
        self.log = log_dir / f"{task.role}-{task.index}.log"
        self.started: Future[int] = Future()
        self.ended: Future[int] = Future()
        self.lost_with = ""
        self._lock = threading.Lock()

    def start_failed(self, error: BaseException) -> None:
        self.ended.set_exception(error)
        self.started.set_exception(error)

    def lose(self, lost_with: str) -> None:
        """Notes that it is being killed because something that it depends on was lost."""
        self.lost_with = lost_with
        self.end(-signal.SIGKILL, lambda: None)

    def end(self, code: int, release: Callable[[], object]) -> None:
        """Notes its end with ``code``. Its id is not reused until ``release``."""
        with self._lock:
            self.ended.set_result(code)
            release()

    def signal(self, number: int) -> None:
        """Signals its process group; harmless when it has not started, or has ended."""
        with self._lock:
            if not self.started.done() or self.ended.done():
                return
            pid = self.started.result()
            try:
                os.killpg(pid, number)
            except ProcessLookupError:  # it does not lead a group yet
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    def kill(self, seconds: float) -> None:
        """Kills it, when it has started, and waits up to ``seconds`` until it has ended."""
        self.started.add_done_callback(lambda started: self.signal(signal.SIGKILL))
        with contextlib.suppress(TimeoutError):
            self.ended.exception(seconds)

    def tail(self) -> str:
        """The last lines of the log."""
        return tail_of(self.log)


def exit_status(pid: int, *, wait: bool = True) -> int | None:
    """The exit status of a child, negative for a signal; None while it runs, unless to ``wait``.
    The child is not reaped, so its id is not reused.
    """
    found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | (0 if wait else os.WNOHANG))
    if found is None:
        return None
    return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status


def open_log(path: Path) -> int:
    """A descriptor that appends to the log at ``path``, which only this user may read."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


def tail_of(path: Path) -> str:
    """The last lines of a log, empty where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            return file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
