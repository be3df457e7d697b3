"""The first use of a version's CPU kernels: one process of a machine compiles them, and says how
far it is.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from numba.core import event

from . import arrays as cpu_arrays

_FORGOTTEN = 30 * 86400.0  # seconds; the lock's file is touched by every process that starts
_READS = 2.0  # seconds: a process that finds its kernels on the disk is through sooner


@contextlib.contextmanager
def alone_in_compiling(report: Callable[[str], None]) -> Iterator[None]:
    """Lets one process at a time through of those that keep compiled kernels in the same folder;
    all of them where there is none.

    ``report`` is told what is waited for: each kernel that is compiled within, or the process that
    is ahead; nothing where all kernels are on the disk.
    """
    with (
        _lock(Path(cpu_arrays.CACHE_FOLDER), report),
        event.install_listener("numba:compile", _Count(report)),
        _old_objects_left_alone(),
    ):
        yield


@contextlib.contextmanager
def _old_objects_left_alone() -> Iterator[None]:
    """A compiler makes many objects, and Python would look through all those of torch again and
    again: a second of thirteen.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def _lock(folder: Path, report: Callable[[str], None]) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "compiling").open("w")
    except OSError:  # numba has nowhere to keep what it compiles, or finds another place
        yield
        return
    _forget_unused(folder)
    with lock:
        if not _taken_within(lock, _READS):
            report("waiting for another process of this machine, which compiles the kernels")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _forget_unused(folder: Path) -> None:
    """Removes what other versions compiled and no process has asked for in a month; 2 MB for each
    kind of model.
    """
    for other in folder.parent.glob("numba-*/compiling"):
        with contextlib.suppress(OSError):  # another process is at it
            if time.time() - other.stat().st_mtime > _FORGOTTEN:
                shutil.rmtree(other.parent)


def _taken_within(lock: IO[str], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        if time.monotonic() > end:
            return False
        time.sleep(0.01)


class _Count(event.Listener):
    """Counts kernels as their compilation begins; those that others call are counted within
    theirs.
    """

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report = report
        self._count = 0

    def on_start(self, event: event.Event) -> None:
        self._count += 1
        self._report(
            f"CPU kernels, once for a version and kind of model: number {self._count}, {event.data['dispatcher'].__name__}"
        )

    def on_end(self, event: event.Event) -> None:
        """A kernel is ready."""
