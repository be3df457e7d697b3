"""A connection to a Ray cluster: one that this launcher starts on its machine, or one that it
joins.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import socket
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from ..environment import ray_address
from .cluster import LaunchError

OBJECT_STORE_BYTES = 100 * 2**20  # nothing but a few small results goes through it
SOCKET_PATH_LIMIT = 107
_KNOCK_SECONDS = 1.0
_SESSION_PATH = 70  # what Ray puts below its folder: /session_<date, time, pid>/sockets/plasma_store


@dataclass(frozen=True)
class Node:
    """A node of the Ray cluster. ``address`` is the one under which the others reach it."""

    id: str
    name: str
    address: str
    cpus: float
    gpus: int

    def __str__(self) -> str:
        return f"{self.name} ({self.address})"


class RaySession:
    """``address`` None and no RAY_ADDRESS starts a cluster of ``num_cpus`` on this machine; else
    the one there is joined.

    ``here`` is the launcher's own node. ``scratch`` is where Ray keeps its sockets and logs when
    they cannot be with the logs of the run, because their path would be too long for a socket.
    Raises LaunchError when Ray cannot be started or reached.
    """

    def __init__(self, log_dir: Path, *, address: str | None, num_cpus: int) -> None:
        address = address or ray_address()
        self.joined = address is not None
        self.scratch: Path | None = None
        self._next_knock = 0.0
        self._head_died = False
        try:
            self._connect(log_dir, address, num_cpus)
            context = ray.get_runtime_context()
            own, self._head = context.get_node_id(), str(context.gcs_address)
            self.here = next(node for node in self.nodes() if node.id == own)
        except (RayError, ConnectionError, OSError, RuntimeError, ValueError, TimeoutError) as error:
            where = (
                f"the Ray cluster at {address} cannot be reached"
                if self.joined
                else "Ray cannot be started on this machine"
            )
            hint = (
                "; where it asks for a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
                if self.joined
                else ""
            )
            raise LaunchError(f"{where}: {' '.join(str(error).split())[:500]}{hint}") from error

    def nodes(self) -> list[Node]:
        """The nodes that are alive."""
        return [_node(entry) for entry in ray.nodes() if entry["Alive"]]

    def check_head(self) -> None:
        """Raises LaunchError when the head process of a cluster that was started here has died:
        whoever asks Ray for anything after that waits, and is ended by Ray without a word of
        ours.
        """
        if self.joined or time.monotonic() < self._next_knock:
            return
        self._next_knock = time.monotonic() + _KNOCK_SECONDS
        try:
            _knock(self._head)
        except ConnectionRefusedError:
            self._head_died = True
            raise LaunchError(
                f"Ray's head process, which listened at {self._head}, has died; its processes go with it"
            ) from None

    @property
    def lost(self) -> bool:
        """Whether ``check_head`` has found the cluster dead."""
        return self._head_died

    def close(self) -> None:
        """Leaves the cluster; one that was started here ends."""
        if not self._head_died:
            if not self.joined:
                _end_autoscaler()
            ray.shutdown()
        if self.scratch is not None:
            shutil.rmtree(self.scratch, ignore_errors=True)

    def _connect(self, log_dir: Path, address: str | None, num_cpus: int) -> None:
        logging.getLogger("ray").setLevel(logging.ERROR)
        common: dict[str, Any] = {
            "log_to_driver": False,
            "logging_level": logging.ERROR,
            "include_dashboard": False,
        }
        if address is not None:
            del common["include_dashboard"]
            _knock(address)
            ray.init(address=address, **common)
            return
        if ray.is_initialized():
            raise RuntimeError("this process has joined a Ray cluster already")
        folder = log_dir / "ray"
        if len(str(folder)) + _SESSION_PATH > SOCKET_PATH_LIMIT:
            self.scratch = folder = Path(tempfile.mkdtemp(prefix="lockstep-ray-", dir="/tmp"))
        ray.init(
            address="local",
            num_cpus=num_cpus,
            object_store_memory=OBJECT_STORE_BYTES,
            _node_ip_address="127.0.0.1",
            _temp_dir=str(folder),
            **common,
        )


def _end_autoscaler() -> None:
    """Kills the autoscaler of a cluster that this process has started. There is nothing to scale;
    but ray.shutdown ends the head before it, and then waits the whole second that it allows for an
    answer to SIGTERM.
    """
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int(
                (folder / "stat").read_bytes().rpartition(b") ")[2].split()[1]
            )  # a process may have any bytes for a name
            if parent == os.getpid() and b"/ray/autoscaler/" in (folder / "cmdline").read_bytes():
                os.kill(int(folder.name), signal.SIGKILL)


def _node(entry: dict[str, Any]) -> Node:
    resources = entry["Resources"]
    name = str(entry["NodeManagerHostname"])
    return Node(
        str(entry["NodeID"]),
        name,
        str(entry["NodeManagerAddress"]),
        resources.get("CPU", 0.0),
        int(resources.get("GPU", 0)),
    )


def _knock(address: str) -> None:
    """Raises OSError or ValueError for an address where nothing listens; Ray itself would try for
    two minutes.
    """
    if address == "auto":
        return
    host, colon, port = address.rpartition(":")
    if not colon or "/" in host or not port.isdecimal():
        raise ValueError("should be host:port of its head node, or auto")
    socket.create_connection((host, int(port)), timeout=5.0).close()
