"""The interface to a place that runs processes: start, signal, report deaths."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ...parallel.recovery import SPENT_STATUS
from ..log_lines import without_start


class LaunchError(RuntimeError):
    """The cluster cannot start or go on; the message is for the person at the terminal."""


@dataclass(frozen=True)
class Imports:
    """A Python ``module`` that tasks of one host have imported once, by the host's fork server,
    with ``environment``, which they all have.
    """

    module: str
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """A process to run: ``python -m lockstep.launch.cluster.entry role index`` with ``spec`` (JSON)
    on its standard input.

    ``node``: number of its group of ranks; None: the launcher's machine. ``num_gpus``: 0 or 1.
    ``module``: the Python module to run. ``imports``: those of the fork server that starts it;
    None: it starts in an interpreter of its own.
    """

    role: str
    index: int
    spec: bytes
    node: int | None = None
    num_gpus: int = 0
    environment: Mapping[str, str] = field(default_factory=dict)
    module: str = "lockstep.launch.cluster.entry"
    imports: Imports | None = None

    @property
    def name(self) -> str:
        return f"{self.role} {self.index}"


@dataclass(frozen=True)
class Place:
    """The place of a task. ``node`` and ``address`` identify its host in a cluster of several."""

    host: str
    pid: int
    log: str
    node: str = ""
    address: str = ""


@dataclass(frozen=True)
class Death:
    """A process that has ended.

    ``code``: exit status, negative for a signal, None when its node or Ray actor was lost, or when
    it could not be started. ``tail``: the last lines it wrote, or the reason. ``lost_with``: its
    node, its Ray actor or its fork server, when that was lost with all processes there.
    """

    task: Task
    place: Place
    code: int | None
    tail: str
    lost_with: str = ""

    @property
    def killed(self) -> bool:
        """Whether a signal ended it, or it was lost with others."""
        return self.code is None or self.code < 0

    @property
    def spent(self) -> bool:
        """Whether it ended because another rank was lost whose exchange it cannot leave."""
        return self.code == SPENT_STATUS

    @property
    def cause(self) -> str:
        if self.lost_with:
            return f"was lost with {self.lost_with}"
        if self.code is None:
            return f"could not be started: {self.last_line}"
        if self.code < 0:
            name = signal.Signals(-self.code).name
            hint = " (the kernel does this when memory runs out)" if name == "SIGKILL" else ""
            return f"was killed by {name}{hint}"
        if self.spent:
            return "ended with its epoch: its transport cannot join another"
        return f"exited with status {self.code}"

    @property
    def last_line(self) -> str:
        """The last line it wrote: the error, if Python raised one."""
        texts = [without_start(line).strip() for line in self.tail.splitlines()]
        return next((text for text in reversed(texts) if text), "")


class Cluster(Protocol):
    """Processes on one machine or many, which reach the launcher's machine at ``host``."""

    host: str
    gpus_per_node: int

    def prepare(self, imports: Imports) -> None:
        """Starts importing the tasks' modules on every node of ranks."""
        ...

    def start(self, tasks: Sequence[Task]) -> None:
        """Starts processes concurrently. Raises LaunchError when one has no room."""
        ...

    def running(self) -> list[tuple[Task, Place]]:
        """Processes that have a place and are not known to have ended."""
        ...

    def waiting(self) -> str:
        """Started processes that wait for a node with room, and why; empty if none waits."""
        ...

    def deaths(self) -> list[Death]:
        """Processes that ended since the last call. Does not block."""
        ...

    def leave_node(self, node: int) -> str:
        """From now on starts the ranks of group ``node`` on another node, where no other group is,
        and never again on this one. Returns that node; empty if none has room, and nothing changes.
        """
        ...

    def signal(self, task: Task, number: int) -> None:
        """Sends a signal to a process; harmless when it has ended."""
        ...

    def close(self) -> None:
        """Kills all remaining processes, waits for their ends, and releases everything."""
        ...
