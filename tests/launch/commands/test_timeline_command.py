"""``launch timeline``: what it refuses before and after it asks; see tests/serving for traces."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from lockstep.engine.protocol.timeline import MOST_SECONDS, MOST_STEPS
from lockstep.launch.commands.main import app

URL = "http://127.0.0.1:1"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["timeline", *arguments])


def test_its_bounds_are_those_of_the_server() -> None:
    words = run("--help").output
    assert f"1<=x<={MOST_STEPS}]" in words and f"0.1<=x<={MOST_SECONDS}]" in words


def test_a_server_that_is_not_there_is_3_and_leaves_no_file(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    out = tmp_path / "trace.json"
    result = run("--url", f"http://127.0.0.1:{port}", "--out", str(out))
    assert result.exit_code == 3 and not out.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--url", "nowhere", "--out", "t"), "--url nowhere: should be http://HOST[:PORT]"),
        (("--url", URL, "--out", "/no/such/folder/t"), "--out /no/such/folder/t: cannot be written"),
        (
            ("--url", URL, "--out", "t", "--admin-key-env", "NO_SUCH_KEY"),
            "--admin-key-env NO_SUCH_KEY: not set",
        ),
        (("--url", URL, "--out", "t", "--steps", "513"), "less than or equal to 512"),
    ],
)
def test_bad_input_is_2(arguments: tuple[str, ...], words: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2 and words in result.output
