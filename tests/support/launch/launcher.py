"""A launch command under test, in a session of its own: its output and the processes it leaves."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

import psutil

from .hosts import Host, inner

TESTS = Path(__file__).parent.parent.parent


class Launcher:
    """``python -m MODULE --recipe ...``, on ``host`` if given; ``data_limit``: bytes of memory that
    each of its processes may have (RLIMIT_DATA). Leaving the context kills what is left of it and
    of the run.
    """

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        module: str = "lockstep.launch.cli",
        environment: dict[str, str] | None = None,
        host: Host | None = None,
        data_limit: int | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._out, self._err = folder / "stdout", folder / "stderr"
        self.temporary = folder / "t"
        self.temporary.mkdir()
        path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, "-m", module, *arguments]
        if data_limit is not None:
            command = ["sh", "-c", f'ulimit -d {data_limit >> 10}; exec "$@"', "sh", *command]
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                command if host is None else host.command(*command, folder=folder),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=folder,
                env=os.environ | {"PYTHONPATH": path, "TMPDIR": str(self.temporary)} | (environment or {}),
                start_new_session=True,
            )
        self._on_host = host is not None
        self.seen: set[psutil.Process] = set()

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    def url(self, seconds: float = 480.0) -> str:
        """Waits for the ready line; returns the base URL."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(r"^ready: (\S+) serves", self.out, re.MULTILINE)):
            assert self.process.poll() is None, f"launch left with {self.process.returncode}\n{self.err}"
            assert time.monotonic() < deadline, f"not ready in {seconds:g} s\n{self.err}"
            time.sleep(0.05)
        self.look()
        return found[1]

    def look(self) -> None:
        """Remembers the processes of the run, to check their end later."""
        self.seen |= set(psutil.Process(self.process.pid).children(recursive=True))

    def pid_of(self, name: str) -> int:
        """The process of ``role index``, by its command line."""
        self.look()
        for process in self.seen:
            if process.is_running() and command_of(process)[-3:-1] == name.split():
                return process.pid
        running = [command_of(process) for process in self.seen if process.is_running()]
        raise AssertionError(f"no process {name} among {running}")

    def signal(self, number: int = signal.SIGTERM) -> None:
        (inner(self.process) if self._on_host else self.process).send_signal(number)

    def wait(self, seconds: float = 90.0) -> int:
        """Waits for the end; returns the exit status."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds:g} s\n{self.out}\n{self.err}") from None

    def assert_nothing_left(self, seconds: float = 30.0) -> None:
        """Asserts that no process seen by ``look`` is alive."""
        assert len(self.seen) >= 2, "look() saw no processes"
        deadline = time.monotonic() + seconds
        while left := [process for process in self.seen if alive(process)]:
            assert time.monotonic() < deadline, (
                f"left behind: {[(process.pid, command_of(process)) for process in left]}"
            )
            time.sleep(0.05)

    def __enter__(self) -> Launcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.look()
            self.process.kill()
            self.process.wait()
        for process in self.seen:
            if alive(process):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()


def command_of(process: psutil.Process) -> list[str]:
    """The command line of a process, empty once it has ended; a forked one has it as one string."""
    try:
        command = process.cmdline()
    except psutil.Error:
        return []
    return command if any(command[1:]) else " ".join(command).split()


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # it has ended between the two questions
        return False
