"""The actor that holds one process on a node of a Ray cluster."""

from __future__ import annotations

import socket
import tempfile
import threading
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import ray

from ..environment import interface_settings
from .child import Child
from .cluster import Place, Task
from .network import interface_of

START_SECONDS = 60.0


class RayHost:
    """Starts a process, waits for it and passes signals on, each in a thread of the actor.

    The process itself has none of Ray's threads and not its allocator. It dies with its actor,
    actors die with their driver.
    """

    def __init__(self, task: Task, log_dir: str) -> None:
        self._task = task
        folder = _folder(Path(log_dir))
        self._child: Future[Child] = Future()
        self._ended = threading.Event()
        # The child dies with the thread that starts it, so that thread stays: see Child.
        threading.Thread(target=self._run, args=(folder,), daemon=True).start()

    def _run(self, folder: Path) -> None:
        try:
            settings = interface_settings(interface_of(_own_address()))
            environment = settings | dict(self._task.environment)
            child = Child(replace(self._task, environment=environment), folder)
        except Exception as error:
            self._child.set_exception(error)
            return
        self._child.set_result(child)
        child.process.wait()
        self._ended.set()

    def place(self) -> Place:
        try:
            child = self._child.result(START_SECONDS)
        except TimeoutError:
            raise TimeoutError(f"{self._task.name} did not start within {START_SECONDS:g} s") from None
        return Place(socket.gethostname(), child.pid, str(child.log), _own_id(), _own_address())

    def wait(self) -> tuple[int, str]:
        """Blocks until the process ends; returns its exit status and the last lines it wrote."""
        child = self._child.result()
        self._ended.wait()
        return child.process.returncode, child.tail()

    def signal(self, number: int) -> None:
        if self._child.done():
            self._child.result().signal(number)


def _folder(log_dir: Path) -> Path:
    """The run's log folder, created on this node; a temporary one if that fails."""
    try:
        log_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return Path(tempfile.mkdtemp(prefix="lockstep-"))
    return log_dir


def _own_id() -> str:
    return str(ray.get_runtime_context().get_node_id())


def _own_address() -> str:
    """The address at which the other nodes reach this one."""
    own = _own_id()
    return str(next(node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == own))
