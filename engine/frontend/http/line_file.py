"""A file of JSON lines, written by a thread so that the event loop never waits for a disk."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable
from queue import Empty, Full, Queue
from typing import Any

import msgspec

MAX_WAITING = 8192  # lines; about 4 MB
CLOSE_SECONDS = 2.0
_BATCH = 512
_encode = msgspec.json.Encoder().encode
_log = logging.getLogger("lockstep.frontend")


class LineFile:
    """Appends to ``path``, also after another process has renamed it away. Lines that the disk does
    not take are dropped: ``lost`` gets their number, on any thread, and the log one warning until a
    line is written again.
    """

    def __init__(self, path: str, lost: Callable[[int], None]) -> None:
        self._path = path
        self._lost = lost
        self._waiting: Queue[dict[str, Any] | None] = Queue(MAX_WAITING)
        self._closing = False
        self._failed = False
        self._torn = False  # the file ends within a line
        self._descriptor = -1
        self._thread = threading.Thread(target=self._run, name="line-file", daemon=True)
        self._thread.start()

    def put(self, document: dict[str, Any]) -> None:
        """Takes a line. The thread encodes ``document`` later, so it must not be changed."""
        try:
            self._waiting.put_nowait(document)
        except Full:
            self._drop(1, f"{MAX_WAITING} lines wait to be written")

    def close(self) -> None:
        """Writes the waiting lines, for at most ``CLOSE_SECONDS``."""
        self._closing = True
        with contextlib.suppress(Full):  # then the thread is awake, and looks at ``_closing``
            self._waiting.put_nowait(None)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self._drop(self._waiting.qsize(), f"not written within {CLOSE_SECONDS:g} s")

    def _run(self) -> None:
        while not (self._closing and self._waiting.empty()):
            batch = [self._waiting.get()]
            try:
                while len(batch) < _BATCH:
                    batch.append(self._waiting.get_nowait())
            except Empty:
                pass
            self._write([_encode(line) + b"\n" for line in batch if line is not None])
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def _write(self, lines: list[bytes]) -> None:
        """A batch in one write, so that lines of several processes do not mix."""
        text = (b"\n" if self._torn else b"") + b"".join(lines)
        unwritten = memoryview(text)
        try:
            self._open()
            while unwritten:
                unwritten = unwritten[os.write(self._descriptor, unwritten) :]
        except OSError as error:
            self._drop(min(bytes(unwritten).count(b"\n"), len(lines)), error.strerror or str(error))
        else:
            if self._failed and lines:
                _log.info("frontend.access_log_file %s is written again", self._path)
                self._failed = False
        written = len(text) - len(unwritten)
        if written:
            self._torn = text[written - 1 : written] != b"\n"

    def _open(self) -> None:
        """Opens the file, again if the path names another one by now."""
        if self._descriptor >= 0:
            try:
                now = os.stat(self._path)
                ours = os.fstat(self._descriptor)
                if (now.st_dev, now.st_ino) == (ours.st_dev, ours.st_ino):
                    return
            except FileNotFoundError:
                pass
            os.close(self._descriptor)
            self._descriptor = -1
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        self._descriptor = os.open(self._path, flags, 0o640)

    def _drop(self, count: int, reason: str) -> None:
        self._lost(count)
        if not self._failed:
            _log.warning("frontend.access_log_file %s: %s; lines are dropped", self._path, reason)
        self._failed = True
