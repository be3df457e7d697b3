"""The folder that holds the logs of one run."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path


class RunFolder:
    """A new folder in ``parent``, or the system's temporary folder; readable by this user only."""

    def __init__(self, parent: str | None) -> None:
        if parent is not None:
            Path(parent).expanduser().mkdir(parents=True, exist_ok=True)
        self._keep = parent is not None
        folder = None if parent is None else Path(parent).expanduser().absolute()
        self.path = Path(tempfile.mkdtemp(prefix="lockstep-", dir=folder))

    def end(self, *, failed: bool) -> bool:
        """Deletes the folder unless ``parent`` was given or the run failed; returns if it stays.

        After a failure only an empty folder is deleted; otherwise always Ray's own files.
        """
        if failed:
            with contextlib.suppress(OSError):
                self.path.rmdir()
            return self.path.exists()
        shutil.rmtree(self.path / "ray" if self._keep else self.path, ignore_errors=True)
        return self._keep
