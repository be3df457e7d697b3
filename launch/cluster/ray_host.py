"""The actor that holds the processes of a run on a node of a Ray cluster."""

from __future__ import annotations

import socket
import tempfile
import threading
from collections import defaultdict
from concurrent.futures import Future
from pathlib import Path

import ray

from ..environment import interface_settings
from .cluster import Imports, Place, Task
from .host import Host
from .network import interface_of
from .process import Process


class RayHost:
    """Starts processes, waits for them and passes signals on, each call in a thread of the actor.

    The processes themselves have none of Ray's threads and not its allocator. They die with their
    actor, actors die with their driver. A process has the ``number`` with which it was started.
    """

    def __init__(self, log_dir: str) -> None:
        address = _own_address()
        self._host = Host(_folder(Path(log_dir)), interface_settings(interface_of(address)))
        self._identity = _own_id(), address
        self._lock = threading.Lock()
        self._processes: defaultdict[int, Future[Process]] = defaultdict(Future)

    def prepare(self, imports: Imports) -> None:
        with self._lock:
            self._host.prepare(imports)

    def start(self, number: int, task: Task) -> Place:
        """Waits until it runs. Raises OSError where it does not start."""
        with self._lock:
            process = self._host.start(task)
            self._processes[number].set_result(process)
        return Place(socket.gethostname(), process.started.result(), str(process.log), *self._identity)

    def wait(self, number: int) -> tuple[int, str, str]:
        """Blocks until the process ends; returns its exit status, the last lines it wrote, and
        ``lost_with`` as in ``Death``.
        """
        process = self._of(number).result()
        return process.ended.result(), process.tail(), process.lost_with

    def signal(self, number: int, signal: int) -> None:
        found = self._of(number)
        if found.done():
            found.result().signal(signal)

    def _of(self, number: int) -> Future[Process]:
        with self._lock:
            return self._processes[number]


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
