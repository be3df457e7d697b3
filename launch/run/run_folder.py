"""The folder that holds the logs of one run."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path


class RunFolder:
    """A fresh folder under ``parent`` (the system's temporary folder when None), readable by this
    user alone.
    """

    def __init__(self, parent: str | None) -> None:
        if parent is not None:
            Path(parent).expanduser().mkdir(parents=True, exist_ok=True)
        self._keep = parent is not None
        self.path = Path(
            tempfile.mkdtemp(
                prefix="lockstep-", dir=None if parent is None else Path(parent).expanduser().absolute()
            )
        )

    def end(self, *, failed: bool) -> bool:
        """Deletes the folder unless it was asked for or the run failed; returns whether it was
        kept.

        An empty one goes in any case, Ray's own files in any case but after a failure.
        """
        if failed:
            with contextlib.suppress(OSError):
                self.path.rmdir()
            return self.path.exists()
        shutil.rmtree(self.path / "ray" if self._keep else self.path, ignore_errors=True)
        return self._keep
