"""First use of a version's CPU kernels: one process of a machine compiles them and reports its
progress.
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

_FORGOTTEN = 30 * 86400.0  # seconds; every process that starts touches the lock file
_READS = 2.0  # seconds: a process that finds its kernels on disk needs less


@contextlib.contextmanager
def alone_in_compiling(report: Callable[[str], None]) -> Iterator[None]:
    """Admits one process at a time among those that share a folder of compiled kernels; all of them
    if there is no folder.

    ``report`` is called with each kernel compiled within, or with a notice that another process is
    ahead. It is not called if all kernels are on disk.
    """
    with (
        _lock(Path(cpu_arrays.CACHE_FOLDER), report),
        event.install_listener("numba:compile", _Count(report)),
        _old_objects_left_alone(),
    ):
        yield


@contextlib.contextmanager
def _old_objects_left_alone() -> Iterator[None]:
    """Keeps Python's garbage collector off existing objects. A compiler makes many objects, and
    rescanning all of torch's took one second of thirteen.
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
    except OSError:  # numba has no folder to write to, or finds another one
        yield
        return
    _forget_unused(folder)
    with lock:
        if not _taken_within(lock, _READS):
            report("waiting for another process on this machine to compile the kernels")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _forget_unused(folder: Path) -> None:
    """Removes kernels of other versions that no process used for a month; each kind of model takes
    2 MB.
    """
    for other in folder.parent.glob("numba-*/compiling"):
        with contextlib.suppress(OSError):  # another process is removing it
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
    """Counts kernels as their compilation begins. A kernel that another one calls is counted within
    the caller's compilation.
    """

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report = report
        self._count = 0

    def on_start(self, event: event.Event) -> None:
        self._count += 1
        name = event.data["dispatcher"].__name__
        self._report(
            f"compiling CPU kernels, once per version and kind of model: number {self._count}, {name}"
        )

    def on_end(self, event: event.Event) -> None:
        """A kernel is ready."""
