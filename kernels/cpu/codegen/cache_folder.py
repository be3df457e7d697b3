"""The folder of compiled kernels: one that can be written and locked."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

_LOG = logging.getLogger(__name__)


def cache_folder(sources: Path, chosen: str, version: str) -> str:
    """The first usable place: ``chosen`` (NUMBA_CACHE_DIR), else beside the code of this package,
    else the user's cache; last a folder of this user's among the temporary ones, which a read-only
    home or a file server without locks leaves.

    Each version of ``sources`` and of numba has its own folder, because numba looks only at the
    file of a function, not at the files of the functions it calls.
    """
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(sources.rglob("*.py"))))
    digest.update(version.encode())
    return kept_folder(f"numba-{digest.hexdigest()[:16]}", chosen)


def kept_folder(name: str, chosen: str = "") -> str:
    """``name`` in the first usable place, as for ``cache_folder``."""
    places = list(_places(chosen))
    for place in places:
        if locks_work(place / name):
            return str(place / name)
    last = _temporary()
    _LOG.warning("compiled kernels are kept in %s: no files can be written and locked in %s", last, places)
    return str(last / name)


def _places(chosen: str) -> Iterator[Path]:
    if chosen:
        yield Path(chosen)
        return
    yield Path(__file__).parent / "__pycache__"
    with contextlib.suppress(RuntimeError):  # a user without a home
        yield Path.home() / ".cache" / "lockstep"


def locks_work(folder: Path) -> bool:
    """Whether files in ``folder``, which is made if it is missing, can be written and locked.

    Without locks two processes would number their kernels alike. NFS has locks unless it is mounted
    with ``nolock`` or the server's lock daemon is off.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "index").open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:  # another process has it
        return True
    except OSError:
        return False
    return True


def _temporary() -> Path:
    """A private temporary folder: the user's, or this process's if another user owns that name (and
    could plant code in it).
    """
    shared = Path(tempfile.gettempdir()) / f"lockstep-{os.getuid()}"
    with contextlib.suppress(OSError):
        shared.mkdir(mode=0o700, exist_ok=True)
        found = shared.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077:
            return shared
    return Path(tempfile.mkdtemp(prefix="lockstep-"))
