"""Processes on this machine, without Ray."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path

from ..environment import visible_gpus
from .cluster import Death, Imports, LaunchError, Place, Task
from .host import Host
from .process import Process

_START_SECONDS = 60.0


class LocalCluster:
    """A cluster of one node. Its ranks see the GPUs that are visible to the launcher."""

    def __init__(self, log_dir: Path) -> None:
        self.host = "127.0.0.1"
        self.gpus_per_node = len(visible_gpus())
        self._host = Host(log_dir, {})
        self._held: dict[str, tuple[Task, Process]] = {}

    def prepare(self, imports: Imports) -> None:
        self._host.prepare(imports)

    def start(self, tasks: Sequence[Task]) -> None:
        for task in tasks:
            assert task.name not in self._held, f"{task.name} runs already"
            if task.num_gpus and task.index >= self.gpus_per_node:
                raise LaunchError(
                    f"{task.name} needs a GPU of its own, but {self.gpus_per_node} are visible here"
                )
            self._held[task.name] = (task, self._host.start(task))

    def running(self) -> list[tuple[Task, Place]]:
        for task, process in self._held.values():
            if task.imports is None:
                process.started.exception(_START_SECONDS)
        return [
            (task, self._place(process))
            for task, process in self._held.values()
            if process.started.done() and process.started.exception() is None
        ]

    def waiting(self) -> str:
        return ""

    def leave_node(self, node: int) -> str:
        return ""

    def deaths(self) -> list[Death]:
        found = []
        for name, (task, process) in list(self._held.items()):
            if process.ended.done():
                del self._held[name]
                if error := process.ended.exception():
                    found.append(Death(task, self._place(process), None, str(error)))
                else:
                    end = process.ended.result(), process.tail(), process.lost_with
                    found.append(Death(task, self._place(process), *end))
        return found

    def signal(self, task: Task, number: int) -> None:
        if task.name in self._held:
            self._held[task.name][1].signal(number)

    def close(self) -> None:
        self._host.close()
        self._held.clear()

    def _place(self, process: Process) -> Place:
        started = process.started
        pid = started.result() if started.done() and started.exception() is None else 0
        return Place(socket.gethostname(), pid, str(process.log))
