"""What the launcher asks of a place to run processes: start them, kill them, say which have
died.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol


class LaunchError(RuntimeError):
    """The cluster cannot start or go on; the message is for the person at the terminal."""


@dataclass(frozen=True)
class Task:
    """A process to run: ``python -m lockstep.launch.cluster.entry role index`` with ``spec`` (JSON)
    on its standard input.

    ``node`` is the group of ranks it belongs to, None for the launcher's own machine. ``num_gpus``
    is 0 or 1. ``module`` is the Python module that is run.
    """

    role: str
    index: int
    spec: bytes
    node: int | None = None
    num_gpus: int = 0
    environment: Mapping[str, str] = field(default_factory=dict)
    module: str = "lockstep.launch.cluster.entry"

    @property
    def name(self) -> str:
        return f"{self.role} {self.index}"


@dataclass(frozen=True)
class Place:
    """Where a task runs. ``node`` and ``address`` are those of its host in the cluster, where that
    has several.
    """

    host: str
    pid: int
    log: str
    node: str = ""
    address: str = ""


@dataclass(frozen=True)
class Death:
    """A process that has ended. ``code`` is the exit status, negative for a signal, None when its
    node or Ray actor went with it; ``tail`` the last lines it wrote; ``lost_node`` the node when
    all of it was lost.
    """

    task: Task
    place: Place
    code: int | None
    tail: str
    lost_node: str = ""

    @property
    def killed(self) -> bool:
        """Ended by a signal, or with its node."""
        return self.code is None or self.code < 0

    @property
    def cause(self) -> str:
        if self.code is None:
            return (
                "was lost with its node"
                if self.lost_node
                else f"was lost with its Ray actor: {self.last_line}"
            )
        if self.code < 0:
            name = signal.Signals(-self.code).name
            return f"was killed by {name}" + (
                " (the kernel does this when memory runs out)" if name == "SIGKILL" else ""
            )
        return f"exited with status {self.code}"

    @property
    def last_line(self) -> str:
        """The last line it wrote, which for a Python process that failed is the error."""
        lines = [line.strip() for line in self.tail.splitlines() if line.strip()]
        return lines[-1] if lines else ""


class Cluster(Protocol):
    """Processes on one machine or many. ``host`` is the address under which they reach the
    launcher's machine.
    """

    host: str
    gpus_per_node: int

    def start(self, tasks: Sequence[Task]) -> None:
        """Starts processes side by side. Raises LaunchError where there is no room for one."""
        ...

    def running(self) -> list[tuple[Task, Place]]:
        """The processes that have been started on a node and are not yet known to have ended."""
        ...

    def waiting(self) -> str:
        """Which of the processes started still wait for a node with room, and why there is none;
        empty when none does.
        """
        ...

    def deaths(self) -> list[Death]:
        """The processes that ended since the last call. Does not block."""
        ...

    def signal(self, task: Task, number: int) -> None:
        """Sends a signal to a process; harmless when it has ended."""
        ...

    def close(self) -> None:
        """Kills what still runs, waits until it is gone, and gives everything back."""
        ...
