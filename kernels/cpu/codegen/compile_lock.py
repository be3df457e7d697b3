"""Keeps the folder of compiled kernels whole while several processes compile into it."""

from __future__ import annotations

import fcntl
import threading
from pathlib import Path
from typing import IO

from numba.core import event


class CompileLock(event.Listener):
    """A lock among the processes that share a folder: one at a time loads, compiles and saves.

    numba numbers the files of a function's signatures by an index that it reads, then writes. Two
    processes that compile two signatures at once would choose the same number, and each would later
    load the other's code. Listens to ``numba:compiler_lock``, which numba holds from its look into
    the cache until the result is saved; nested compilations take the lock once.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._guard = threading.Lock()
        self._depth = 0
        self._file: IO[str] | None = None

    def on_start(self, event: event.Event) -> None:
        with self._guard:
            if not self._depth:
                self._file = self._locked()
            self._depth += 1

    def on_end(self, event: event.Event) -> None:
        with self._guard:
            self._depth -= 1
            if not self._depth and self._file is not None:
                fcntl.flock(self._file, fcntl.LOCK_UN)  # closing does not unlock for a forked child
                self._file.close()
                self._file = None

    def _locked(self) -> IO[str] | None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            file = (self._folder / "index").open("w")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # no folder or no locks here: numba keeps nothing, or this process is alone
            return None
        return file
