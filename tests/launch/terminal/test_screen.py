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
