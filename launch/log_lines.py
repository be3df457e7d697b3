"""The lines of a process's log: ``2026-10-01T12:00:00.123Z INFO rank-0: text``.

Every line of a message begins so, those of a traceback too: each can be found by time, level and
process, and no text that came from outside looks like a line of its own.
"""

from __future__ import annotations

import logging
import re
import sys
import threading
import time
from types import TracebackType

_START = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z [A-Z]+ [^ :]+: ")
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), 127, *range(128, 160)) if code != ord("\t")}
_log = logging.getLogger("lockstep.process")


class LineFormatter(logging.Formatter):
    """Formats records of ``process``, with times in UTC."""

    def __init__(self, process: str) -> None:
        super().__init__("%(message)s")
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        start = line_start(record.created, record.levelname, self._process)
        if not record.name.startswith("lockstep"):
            start += f"{record.name}: "
        return "\n".join(start + line.translate(_CONTROLS) for line in super().format(record).splitlines())


def line_start(seconds: float, level: str, process: str) -> str:
    """The start of a line written at ``seconds`` since 1970."""
    milliseconds = int(seconds * 1000)
    clock = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(milliseconds // 1000))
    return f"{clock}.{milliseconds % 1000:03d}Z {level} {process}: "


def without_start(line: str) -> str:
    """The text of a line of a log."""
    return _START.sub("", line, count=1)


def log_to_stderr(process: str) -> None:
    """Sends the log of this process to standard error: our own from INFO on, others' from WARNING
    on, with warnings and with exceptions that end a thread.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter(process))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("lockstep").setLevel(logging.INFO)
    logging.captureWarnings(True)
    threading.excepthook = _log_thread
    sys.unraisablehook = _log_unraisable
    sys.excepthook = _log_exception


def _log_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    _log.critical("an exception ends the process", exc_info=(kind, error, trace))


def _log_thread(failed: threading.ExceptHookArgs) -> None:
    name = "a thread" if failed.thread is None else failed.thread.name
    error = failed.exc_value or failed.exc_type()
    _log.error("an exception ends %s", name, exc_info=(failed.exc_type, error, failed.exc_traceback))


def _log_unraisable(failed: sys.UnraisableHookArgs) -> None:
    error = failed.exc_value or failed.exc_type()
    where = failed.err_msg or "an exception was ignored"
    _log.error("%s", where, exc_info=(failed.exc_type, error, failed.exc_traceback))
