"""Processes on this machine, without Ray."""

from __future__ import annotations

import signal
import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..environment import visible_gpus
from .child import Child
from .cluster import Death, LaunchError, Place, Task


class LocalCluster:
    """A cluster of one node. Rank i gets the i-th GPU that is visible to the launcher."""

    def __init__(self, log_dir: Path) -> None:
        self.host = "127.0.0.1"
        self._log_dir = log_dir
        self._gpus = visible_gpus()
        self.gpus_per_node = len(self._gpus)
        self._children: dict[str, tuple[Task, Child]] = {}

    def start(self, tasks: Sequence[Task]) -> None:
        for task in tasks:
            assert task.name not in self._children, f"{task.name} runs already"
            self._children[task.name] = (task, Child(self._with_gpu(task), self._log_dir))

    def _with_gpu(self, task: Task) -> Task:
        if not task.num_gpus:
            return task
        if task.index >= len(self._gpus):
            raise LaunchError(f"{task.name} needs a GPU of its own, but {len(self._gpus)} are visible here")
        return replace(
            task, environment=dict(task.environment) | {"CUDA_VISIBLE_DEVICES": self._gpus[task.index]}
        )

    def running(self) -> list[tuple[Task, Place]]:
        return [(task, self._place(child)) for task, child in self._children.values()]

    def waiting(self) -> str:
        return ""

    def leave_node(self, node: int) -> str:
        return ""

    def deaths(self) -> list[Death]:
        found = []
        for name, (task, child) in list(self._children.items()):
            code = child.process.poll()
            if code is not None:
                del self._children[name]
                found.append(Death(task, self._place(child), code, child.tail()))
        return found

    def signal(self, task: Task, number: int) -> None:
        if task.name in self._children:
            self._children[task.name][1].signal(number)

    def close(self) -> None:
        for _, child in self._children.values():
            child.signal(signal.SIGKILL)
        for _, child in self._children.values():
            child.kill()
        self._children.clear()

    def _place(self, child: Child) -> Place:
        return Place(socket.gethostname(), child.pid, str(child.log))
