"""Runs one command of a Slurm step: ``python -m lockstep.launch.slurm.step [options] COMMAND...``.

``scancel`` sends SIGTERM to every step of a job at once: to Ray and the ranks as well as to launch,
which could then not drain. So a step's command runs in a session of its own, and this wrapper
ignores SIGTERM. The job's script, which gets SIGTERM too, ends the steps one by one with SIGUSR1
(srun passes it on): the command then gets SIGTERM. If the wrapper is killed, so is the command.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from argparse import REMAINDER, ArgumentParser, Namespace
from pathlib import Path
from types import FrameType

from ..cluster.entry import leave_with_parent


class SlurmStep:
    """A running command.

    After a request to end it is killed after ``patience`` seconds, and the status is 0 either way.
    With None it is never killed, and its own status counts.
    """

    def __init__(self, command: list[str], patience: float | None) -> None:
        self._patience = patience
        self._told = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, _take_no_notice)
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        signal.signal(signal.SIGUSR1, self._tell)
        signal.signal(signal.SIGALRM, self._kill)
        wrapper = os.getpid()
        self._process = subprocess.Popen(
            command, start_new_session=True, preexec_fn=lambda: _become_command(wrapper, mask)
        )
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def wait(self) -> int:
        """Waits for the command, kills the rest of its session; returns a shell's exit status."""
        os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        signal.setitimer(signal.ITIMER_REAL, 0)
        self._kill()
        code = self._process.wait()
        if self._told and self._patience is not None:
            return 0
        return code if code >= 0 else 128 - code

    def _tell(self, number: int, frame: FrameType | None) -> None:
        if self._told:
            return
        self._told = True
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        if self._patience is not None:
            signal.setitimer(signal.ITIMER_REAL, self._patience)

    def _kill(self, number: int = 0, frame: FrameType | None = None) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


def _take_no_notice(number: int, frame: FrameType | None) -> None:
    """Ignores a signal. The command would inherit SIG_IGN, but no handler."""


def _become_command(wrapper: int, mask: set[signal.Signals] | set[int]) -> None:
    leave_with_parent(wrapper)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def parse(arguments: list[str]) -> Namespace:
    parser = ArgumentParser(prog="slurm_step", allow_abbrev=False)
    parser.add_argument(
        "--scratch", type=Path, help="Ray's folder on this node: made at the start, deleted at the end"
    )
    parser.add_argument("--logs", type=Path, help="folder to copy Ray's logs to")
    parser.add_argument(
        "--patience",
        type=float,
        help="seconds the command gets to end before it is killed; the status is then 0",
    )
    parser.add_argument("command", nargs=REMAINDER)
    return parser.parse_args(arguments)


def main() -> None:
    options = parse(sys.argv[1:])
    scratch: Path | None = options.scratch
    if scratch is not None:
        scratch.mkdir(mode=0o700, exist_ok=True)
    try:
        code = SlurmStep(options.command, options.patience).wait()
    finally:
        if scratch is not None:
            _clear(scratch, options.logs)
    sys.exit(code)


def _clear(scratch: Path, logs: Path | None) -> None:
    found = (scratch / "session_latest" / "logs").resolve()
    if logs is not None and found.is_dir():
        shutil.copytree(
            found, logs / f"ray-{socket.gethostname()}", dirs_exist_ok=True, ignore_dangling_symlinks=True
        )
    shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
