"""The reaper process: outlives the launcher briefly and kills the processes it left behind.

Children die with their parent and Ray's processes with their driver, but some of those take a
minute to notice. Every process of a run inherits a mark in its environment; when the launcher is
gone, the reaper kills every process with the mark. Linux only: it reads ``/proc``.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from ..environment import RUN_MARK, child_environment, mark_run

_PATIENCE = 0.5
_INSISTENCE = 5.0
_POLL = 0.05


class Reaper:
    """Marks this run and starts the reaper process. ``finish`` leaves no process with the mark."""

    def __init__(self) -> None:
        self.mark = f"{os.getpid()}-{secrets.token_hex(8)}"
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "lockstep.launch.cluster.reaper", self.mark],
            stdin=subprocess.PIPE,
            env=child_environment({}),
            start_new_session=True,
        )
        mark_run(self.mark)

    def inherit(self, folder: Path) -> None:
        """Hands over a folder that the reaper deletes at the end, whatever that end is."""
        assert self._process.stdin is not None
        self._process.stdin.write(os.fsencode(folder) + b"\n")
        self._process.stdin.flush()

    def finish(self) -> None:
        """Waits briefly for processes with the mark, kills the rest, and ends the reaper."""
        reap(self.mark, _PATIENCE)
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait(10.0)


def marked(mark: str) -> list[int]:
    """Ids of this user's processes that have the mark, except this process."""
    needle = f"{RUN_MARK}={mark}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if needle in (folder / "environ").read_bytes().split(b"\0") and int(folder.name) != os.getpid():
                found.append(int(folder.name))
    return found


def reap(mark: str, patience: float) -> None:
    """Waits up to ``patience`` seconds until no process has the mark, then kills those left."""
    deadline = time.monotonic() + patience
    while (found := marked(mark)) and time.monotonic() < deadline + _INSISTENCE:
        if time.monotonic() > deadline:
            for pid in found:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(_POLL)


def main() -> None:
    """Waits until the launcher's end of the pipe closes, then reaps."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    folders = sys.stdin.buffer.read().splitlines()
    reap(sys.argv[1], _PATIENCE)
    for folder in folders:
        shutil.rmtree(os.fsdecode(folder), ignore_errors=True)


if __name__ == "__main__":
    main()
