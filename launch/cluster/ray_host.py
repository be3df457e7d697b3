"""The actor that holds one process on a node of a Ray cluster."""

from __future__ import annotations

import socket
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import ray

from ..environment import interface_settings
from .child import Child
from .cluster import Place, Task
from .network import interface_of

START_SECONDS = 60.0


class RayHost:
    """Starts a process, waits for it and passes signals on. ``wait`` occupies one of its threads,
    signals take another.

    The process itself stays free of Ray's threads and of its allocator. It dies with its actor, and
    actors die with their driver.
    """

    def __init__(self, task: Task, log_dir: str) -> None:
        self._task = task
        folder = _folder(Path(log_dir))
        self._child: Child | None = None
        self._started, self._ended = threading.Event(), threading.Event()
        threading.Thread(
            target=self._run, args=(folder,), daemon=True
        ).start()  # a thread that stays: see Child

    def _run(self, folder: Path) -> None:
        settings = interface_settings(interface_of(_own_address()))
        self._child = Child(replace(self._task, environment=settings | dict(self._task.environment)), folder)
        self._started.set()
        self._child.process.wait()
        self._ended.set()

    def place(self) -> Place:
        assert self._started.wait(START_SECONDS) and self._child is not None, (
            f"{self._task.name} was not started"
        )
        return Place(socket.gethostname(), self._child.pid, str(self._child.log), _own_id(), _own_address())

    def wait(self) -> tuple[int, str]:
        """Blocks until the process ends; returns its exit status and the last lines it wrote."""
        self._ended.wait()
        assert self._child is not None
        return self._child.process.returncode, self._child.tail()

    def signal(self, number: int) -> None:
        if self._child is not None:
            self._child.signal(number)


def _folder(log_dir: Path) -> Path:
    """That of the run, which has the same path on every node; one of its own where that cannot
    be.
    """
    try:
        log_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return Path(tempfile.mkdtemp(prefix="lockstep-"))
    return log_dir


def _own_id() -> str:
    return str(ray.get_runtime_context().get_node_id())


def _own_address() -> str:
    """The address under which the other nodes reach this one."""
    own = _own_id()
    return str(next(node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == own))
