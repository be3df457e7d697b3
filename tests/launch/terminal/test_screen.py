"""Progress on the terminal while a cluster starts, also on a narrow one."""

from __future__ import annotations

import io
import re

import pytest

from lockstep.engine.protocol.cluster_state import Report
from lockstep.launch.terminal.screen import Screen

_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("columns", [60, 80, 140])
def test_every_process_is_named_in_full_on_a_line_of_its_own(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    screen = Screen()
    detail = "waiting for another process of this machine, which compiles the kernels"
    names = ["controller 0", "frontend 0", "rank 10", "rank 11"]
    for name in names:
        screen.show(name, Report(name, 0, "host", 1, "compiling", detail))
    screen.hide()
    lines = [line for line in re.split(r"[\r\n]+", _CONTROL.sub("", terminal.getvalue())) if line.strip()]
    for name in names:
        assert any(
            line.strip().startswith(f"{name} ") and "compiling" in line and "0:00:0" in line
            for line in lines[-4:]
        ), lines[-4:]
    assert max(map(len, lines)) <= columns


def test_without_a_terminal_lines_have_the_form_of_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    output = io.StringIO()
    monkeypatch.setattr("sys.stderr", output)
    monkeypatch.setattr("sys.stdout", output)
    screen = Screen()
    screen.say("rank 1 [red] died")
    screen.show("rank 0", Report("rank", 0, "host", 1, "compiling", "number 1"))
    screen.show("rank 0", Report("rank", 0, "host", 1, "compiling", "number 2"))
    screen.error("the reason")
    lines = output.getvalue().splitlines()
    start = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z INFO launch: "
    assert re.fullmatch(start + r"rank 1 \[red\] died", lines[0])
    assert re.fullmatch(start + r"rank 0: compiling \(number 1\)", lines[1])
    assert lines[2:] == ["error: the reason"]


def test_a_long_compilation_is_told_of_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    output, now = io.StringIO(), [100.0]
    monkeypatch.setattr("sys.stderr", output)
    monkeypatch.setattr("lockstep.launch.terminal.screen.time.monotonic", lambda: now[0])
    screen = Screen()
    for number in range(1, 26):
        screen.show("rank 0", Report("rank", 0, "host", 1, "compiling", f"number {number}"))
        now[0] += 1.0
    assert re.findall(r"number (\d+)", output.getvalue()) == ["1", "12", "23"]


def test_the_timeline_tells_compiling_from_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    output, now = io.StringIO(), [100.0]
    monkeypatch.setattr("sys.stdout", output)
    monkeypatch.setattr("lockstep.launch.terminal.screen.time.monotonic", lambda: now[0])
    screen = Screen()
    now[0] += 58.3
    screen.mark_part("compile", 50.1)
    screen.mark("load", "slowest: rank 0 on host")
    screen.ready("http://x", None, "demo", None)
    assert "after 58.3 s (compile 50.1, load 8.2 (slowest: rank 0 on host))" in output.getvalue()
