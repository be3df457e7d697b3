"""Lines of logs: time, level and process on each, whatever is logged."""

from __future__ import annotations

import logging
import re
import subprocess
import sys

import pytest

from lockstep.launch.log_lines import LineFormatter, line_start, without_start

LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (INFO|WARNING|ERROR|CRITICAL) rank-3: (.*)")


def formatted(text: str, name: str = "lockstep.engine", **fields: object) -> list[str]:
    record = logging.LogRecord(name, logging.INFO, __file__, 1, text, (), None)
    record.__dict__.update(fields)
    return LineFormatter("rank-3").format(record).split("\n")


def test_the_time_is_utc_with_milliseconds() -> None:
    assert line_start(0.0, "INFO", "rank-3") == "1970-01-01T00:00:00.000Z INFO rank-3: "
    assert line_start(1759320000.9996, "ERROR", "x") == "2025-10-01T12:00:00.999Z ERROR x: "
    assert formatted("a", created=951782400.25) == ["2000-02-29T00:00:00.250Z INFO rank-3: a"]


def test_every_line_of_a_message_starts_so() -> None:
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        lines = formatted("it failed", exc_info=sys.exc_info())
    assert len(lines) >= 5
    assert all(LINE.fullmatch(line) for line in lines), lines
    assert [without_start(line) for line in lines[-2:]] == ["ValueError: first", "second"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb", ["a", "b"]),
        ("a\r\nb", ["a", "b"]),
        ("a\u2028b\x85c\x0bd", ["a", "b", "c", "d"]),
        ("\x1b[31mred\x1b[0m", ["\\x1b[31mred\\x1b[0m"]),
        ("tab\there\x00\x7f\x9b", ["tab\there\\x00\\x7f\\x9b"]),
        ("Grüße 你好", ["Grüße 你好"]),
        ("100 % of %s", ["100 % of %s"]),
    ],
)
def test_no_text_breaks_a_line_or_moves_a_cursor(text: str, shown: list[str]) -> None:
    lines = formatted(text)
    assert [found[2] for line in lines if (found := LINE.fullmatch(line))] == shown
    assert len(lines) == len(shown)


def test_others_are_named() -> None:
    assert without_start(formatted("x", name="uvicorn.error")[0]) == "uvicorn.error: x"


def test_without_start_leaves_other_lines_alone() -> None:
    for line in ("", "RuntimeError: the reason", "Fatal Python error: Aborted", "2026-01-01 INFO: x"):
        assert without_start(line) == line


SCRIPT = """
import logging, threading, warnings
from lockstep.launch.log_lines import log_to_stderr
log_to_stderr("rank-3")
logging.getLogger("lockstep.engine").info("ours")
logging.getLogger("lockstep.engine").debug("hidden")
logging.getLogger("other").info("hidden")
logging.getLogger("other").warning("theirs")
warnings.warn("a warning")
thread = threading.Thread(target=lambda: 1 / 0, name="worker")
thread.start(); thread.join()
class Broken:
    def __del__(self): raise KeyError("in a finalizer")
Broken()
raise SystemError("the end")
"""


def test_a_process_logs_all_it_has_to_say_in_this_form() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60)
    lines = done.stderr.splitlines()
    assert all(LINE.fullmatch(line) for line in lines), done.stderr
    texts = [without_start(line) for line in lines]
    assert texts[:2] == ["ours", "other: theirs"]
    assert any("UserWarning: a warning" in text for text in texts)
    assert "an exception ends worker" in texts and "ZeroDivisionError: division by zero" in texts
    assert any("in a finalizer" in text for text in texts)
    assert texts[-1] == "SystemError: the end"
    assert "hidden" not in done.stderr
    assert done.returncode == 1
