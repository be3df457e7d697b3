"""Keeps the folder of compiled kernels whole while several processes compile into it."""

from __future__ import annotations

import contextlib
import fcntl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from numba.core import caching, event


class CompileLock(event.Listener):
    """A lock among the processes that share a folder: one at a time loads, compiles and saves.

    numba numbers the files of a function's signatures by an index that it reads, then writes. Two
    processes that compile two signatures at once would choose the same number, and each would later
    load the other's code. Listens to ``numba:compiler_lock``, which numba holds from its look into
    the cache until the result is saved; nested compilations take the lock once.

    Processes within ``shared`` compile beside each other; then only ``save_one_at_a_time`` guards
    the index.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._guard = threading.Lock()
        self._depth = 0
        self._file: IO[str] | None = None
        self._kind = fcntl.LOCK_EX

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """Lets other processes that share the lock compile at the same time."""
        before, self._kind = self._kind, fcntl.LOCK_SH
        try:
            yield
        finally:
            self._kind = before

    def on_start(self, event: event.Event) -> None:
        with self._guard:
            if not self._depth:
                self._file = locked(self._folder / "index", self._kind)
            self._depth += 1

    def on_end(self, event: event.Event) -> None:
        with self._guard:
            self._depth -= 1
            if not self._depth and self._file is not None:
                unlock(self._file)
                self._file = None


def save_one_at_a_time() -> None:
    """Makes numba of this process lock a folder while it saves a kernel there."""
    if getattr(caching.IndexDataCacheFile.save, "alone", False):
        return
    save: Callable[[Any, Any, Any], None] = caching.IndexDataCacheFile.save

    def save_alone(self: Any, key: Any, data: Any) -> None:
        file = locked(Path(self._cache_path) / "saving", fcntl.LOCK_EX)
        try:
            save(self, key, data)
        finally:
            if file is not None:
                unlock(file)

    save_alone.alone = True  # type: ignore[attr-defined]
    caching.IndexDataCacheFile.save = save_alone  # type: ignore[method-assign]


def locked(path: Path, kind: int) -> IO[str] | None:
    """The file, locked. None if there is no folder, or no locks there: numba keeps nothing, or this
    process is alone. Raises BlockingIOError if ``kind`` has LOCK_NB and another process has it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")  # NFS wants a reader for LOCK_SH, a writer for LOCK_EX
    except OSError:
        return None
    try:
        fcntl.flock(file, kind)
    except OSError as error:
        file.close()
        if isinstance(error, BlockingIOError):
            raise
        return None
    return file


def unlock(file: IO[str]) -> None:
    """Unlocks and closes; closing alone does not unlock for a forked child."""
    fcntl.flock(file, fcntl.LOCK_UN)
    file.close()
