"""The wrapper of a step's command: signals that end it, its exit status, files it leaves."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from support.launch.clusters import until

WRAPPER = [sys.executable, "-P", "-m", "lockstep.launch.slurm.step"]
# Says its process id, then ends with 7 when it is told to.
ORDERLY = "trap 'echo told; exit 7' TERM; echo $$; while :; do sleep 0.05; done"
DEAF = "trap '' TERM; echo $$; while :; do sleep 0.05; done"


class Step:
    """A wrapper and its command, a shell script whose first line of output is its process id."""

    def __init__(self, script: str, *options: str) -> None:
        self.wrapper = subprocess.Popen(
            [*WRAPPER, *options, "bash", "-c", script], stdout=subprocess.PIPE, text=True
        )
        assert self.wrapper.stdout is not None
        self.command = int(self.wrapper.stdout.readline())

    def end(self) -> int:
        return self.wrapper.wait(20)

    def close(self) -> None:
        self.wrapper.kill()
        self.wrapper.communicate()


@pytest.fixture
def steps() -> Iterator[list[Step]]:
    made: list[Step] = []
    yield made
    for step in made:
        step.close()


def start(steps: list[Step], script: str, *options: str) -> Step:
    steps.append(Step(script, *options))
    return steps[-1]


def stat(pid: int) -> list[str]:
    """Its state, parent, process group and session; Z for a process that is no more."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[:4]
    except OSError:
        return ["Z", "", "", ""]


def gone(pid: int) -> bool:
    return stat(pid)[0] == "Z"


@pytest.mark.parametrize(
    ("script", "code"), [("echo $$; exit 0", 0), ("echo $$; exit 3", 3), ("echo $$; kill -KILL $$", 137)]
)
def test_the_exit_status_is_the_commands(script: str, code: int, steps: list[Step]) -> None:
    assert start(steps, script).end() == code


def test_sigterm_is_ignored_and_sigusr1_ends_the_command_once(steps: list[Step]) -> None:
    step = start(steps, ORDERLY)
    step.wrapper.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert step.wrapper.poll() is None and not gone(step.command)
    for _ in range(3):
        step.wrapper.send_signal(signal.SIGUSR1)
    assert step.end() == 7
    assert step.wrapper.stdout is not None and step.wrapper.stdout.read() == "told\n"


def test_the_command_is_in_a_session_of_its_own(steps: list[Step]) -> None:
    step = start(steps, ORDERLY)
    assert stat(step.command)[2:] == [str(step.command)] * 2


def test_with_patience_any_end_that_was_asked_for_is_well(steps: list[Step]) -> None:
    assert start(steps, "echo $$; exit 3", "--patience", "5").end() == 3
    for script in (ORDERLY, DEAF):
        step = start(steps, script, "--patience", "0.3")
        step.wrapper.send_signal(signal.SIGUSR1)
        assert step.end() == 0
        assert gone(step.command)


def test_the_command_goes_with_its_wrapper(steps: list[Step]) -> None:
    step = start(steps, DEAF)
    step.wrapper.kill()
    step.end()
    until(lambda: gone(step.command), "the command to go")


def test_nothing_of_its_session_stays(steps: list[Step]) -> None:
    step = start(steps, "echo $$; (trap '' TERM; exec sleep 60) & exit 0")
    assert step.end() == 0
    until(
        lambda: all(gone(pid) for pid in psutil.pids() if stat(pid)[2] == str(step.command)),
        "what it started to go",
    )


def test_scratch_is_made_and_deleted_and_its_logs_are_kept(steps: list[Step], tmp_path: Path) -> None:
    scratch, logs = tmp_path / "scratch", tmp_path / "logs"
    script = f"echo $$; cd {scratch}; mkdir -p session_1/logs; ln -s session_1 session_latest; "
    script += "echo said > session_1/logs/gcs.out"
    assert start(steps, script, "--scratch", str(scratch), "--logs", str(logs)).end() == 0
    assert not scratch.exists()
    assert (logs / f"ray-{socket.gethostname()}" / "gcs.out").read_text() == "said\n"
