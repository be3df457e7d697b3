"""First use of a version's CPU kernels: the processes of a machine share the compiling and report
its progress.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import logging
import multiprocessing
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from numba.core import event
from numba.core.registry import cpu_target

from . import arrays as cpu_arrays
from .compile_lock import locked, unlock
from .wanted import Wanted

_LOG = logging.getLogger(__name__)

_FORGOTTEN = 30 * 86400.0  # seconds; every process that starts touches the lock file
_READS = 2.0  # seconds: a process that finds its kernels on disk needs less
_COMPILES = 600.0  # seconds for one kernel in another process; the longest takes 12 on an idle core
_HELPERS = 7  # at most, per process: a kind of model has 15 to 25 kernels
_LOOKS = 0.05  # seconds between looks at what others have compiled


def import_registries() -> None:
    """Imports the types and functions that numba knows on CPUs, as the first kernel of a process
    does: 57 modules.
    """
    cpu_target.typing_context.refresh()
    cpu_target.target_context.refresh()


def compile_shared(wanted: Sequence[Wanted], report: Callable[[str], None], helpers: int = 0) -> None:
    """Compiles the kernels that are not on disk, each in one of the processes that do the same at
    the same time, and loads the rest. ``helpers``: further processes to start for it.

    ``report`` is called with the number of kernels that are done as one is compiled, or waited for.
    Without a folder it does nothing: the first call of a kernel compiles it.
    """
    folder = Path(cpu_arrays.CACHE_FOLDER)
    missing = [kernel for kernel in wanted if not _is_done(folder, kernel)]
    with _helped(missing, min(helpers, _HELPERS, len(missing) - 1)):
        progress = _Progress(folder, wanted, report)
        # The last ones first: sampling and attention take longest, norms least.
        left = [kernel for kernel in reversed(wanted) if not _compile_unless_taken(folder, kernel, progress)]
        for kernel in left:
            _wait_for(folder, kernel, progress)


def _compile_unless_taken(folder: Path, kernel: Wanted, progress: _Progress) -> bool:
    """Compiles or loads a kernel. False if another process is compiling it."""
    try:
        claim = locked(_claim(folder, kernel), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    if claim is None:  # no folder, or no locks in it
        return True
    try:
        with (
            cpu_arrays.COMPILE_LOCK.shared(),
            event.install_listener("numba:compile", progress),
            _old_objects_left_alone(),
        ):
            kernel.compile()
        if not claim.tell():
            claim.write("done\n")
            claim.flush()
    finally:
        unlock(claim)
    return True


def _wait_for(folder: Path, kernel: Wanted, progress: _Progress) -> None:
    """Loads a kernel as soon as the process that compiles it has ended or is done."""
    end = time.monotonic() + _COMPILES
    while not _compile_unless_taken(folder, kernel, progress):
        if not _is_done(folder, kernel):
            progress.tell()
        if time.monotonic() > end:
            _LOG.warning("compiling %s here too: another process needs over %g s", kernel.name, _COMPILES)
            kernel.compile()
            return
        time.sleep(_LOOKS)


def _claim(folder: Path, kernel: Wanted) -> Path:
    """The file that a process locks while it compiles a kernel, and fills when that is done."""
    return folder / f"claim-{kernel.digest}"


def _is_done(folder: Path, kernel: Wanted) -> bool:
    with contextlib.suppress(OSError):
        return _claim(folder, kernel).stat().st_size > 0
    return False


class _Progress(event.Listener):
    """Reports the number of kernels done, as one is compiled here or waited for."""

    def __init__(self, folder: Path, wanted: Sequence[Wanted], report: Callable[[str], None]) -> None:
        self._folder = folder
        self._wanted = wanted
        self._report = report
        self._told = -1

    def tell(self) -> None:
        done = sum(_is_done(self._folder, kernel) for kernel in self._wanted)
        if done > self._told:
            self._told = done
            self._report(
                f"CPU kernels, once per version and kind of model: {done} of {len(self._wanted)} compiled"
            )

    def on_start(self, event: event.Event) -> None:
        self.tell()

    def on_end(self, event: event.Event) -> None:
        """A kernel, or one that it calls, is ready."""


# --------------------------------------------------------------------------- further processes


@contextlib.contextmanager
def _helped(missing: Sequence[Wanted], count: int) -> Iterator[None]:
    """Starts processes that compile kernels from the same list. They end with the list; one that
    fails leaves its kernel to the others.
    """
    spawn = multiprocessing.get_context("spawn")
    helpers = [
        spawn.Process(target=_help, args=(list(missing),), name=f"compile {i}", daemon=True)
        for i in range(max(0, count))
    ]
    for helper in helpers:
        helper.start()
    try:
        yield
    finally:
        for helper in helpers:
            helper.terminate()  # its list is done, or this process has failed
            helper.join()


def _help(missing: list[Wanted]) -> None:
    folder = Path(cpu_arrays.CACHE_FOLDER)
    progress = _Progress(folder, missing, lambda _: None)
    for kernel in reversed(missing):
        _compile_unless_taken(folder, kernel, progress)


# --------------------------------------------------------------------------- the run afterwards


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
    path = folder / "compiling"
    end = time.monotonic() + _READS
    waits = False
    while True:
        try:
            lock = locked(path, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
            break
        except BlockingIOError:
            if time.monotonic() > end:
                waits = True
                report("waiting for another process on this machine to compile the kernels")
            time.sleep(0.01)
    if lock is None:  # numba has no folder to write to, or finds another one
        yield
        return
    _forget_unused(folder)
    try:
        path.touch()
        yield
    finally:
        unlock(lock)


def _forget_unused(folder: Path) -> None:
    """Removes kernels of other versions that no process used for a month; each kind of model takes
    2 MB.
    """
    for other in folder.parent.glob("numba-*/compiling"):
        with contextlib.suppress(OSError):  # another process is removing it
            if other.parent != folder and time.time() - other.stat().st_mtime > _FORGOTTEN:
                shutil.rmtree(other.parent)


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
