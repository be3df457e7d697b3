"""A connection to a Ray cluster that this launcher starts on its machine, or joins."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import shutil
import socket
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from ..environment import ray_address, ray_is_guarded
from .cluster import LaunchError

OBJECT_STORE_BYTES = 100 * 2**20  # holds only a few small results
SOCKET_PATH_LIMIT = 107
_CHECK_SECONDS = 1.0
_SESSION_PATH = 70  # Ray's part of a socket path: /session_<date, time, pid>/sockets/plasma_store
_FAILURES = (RayError, ConnectionError, OSError, RuntimeError, ValueError, TimeoutError)


@dataclass(frozen=True)
class Node:
    """A node of the Ray cluster. ``address`` is the one other nodes reach it by."""

    id: str
    name: str
    address: str
    cpus: float
    gpus: int

    def __str__(self) -> str:
        return f"{self.name} ({self.address})"


class RaySession:
    """Starts a cluster of ``num_cpus`` on this machine, or joins the one at ``address`` or
    RAY_ADDRESS.

    ``here`` is the launcher's own node. ``scratch`` is Ray's folder of sockets and logs when it
    cannot be in ``log_dir``, whose path would be too long for a socket; else None. Raises
    LaunchError when Ray cannot be started or reached.
    """

    def __init__(self, log_dir: Path, *, address: str | None, num_cpus: int) -> None:
        address = address or ray_address()
        self.joined = address is not None
        self._next_check = 0.0
        self._head_died = False
        self.scratch: Path | None = None
        try:
            if address is not None:
                _join(address)
            else:
                self.scratch = _short_folder(log_dir)
                _start(self.scratch or log_dir / "ray", num_cpus)
            context = ray.get_runtime_context()
            own = context.get_node_id()
            self._head = str(context.gcs_address)
            self.here = next(node for node in self.nodes() if node.id == own)
        except _FAILURES as error:
            problem, hint = "Ray cannot be started on this machine", ""
            if self.joined:
                problem = f"the Ray cluster at {address} cannot be reached"
                hint = "; where it asks for a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
            raise LaunchError(f"{problem}: {' '.join(str(error).split())[:500]}{hint}") from error
        self._check_doors(address)

    def _check_doors(self, address: str | None) -> None:
        """Refuses a Ray that others can reach without authentication.

        They could start processes, and read the keys of the run. One for this machine alone must
        listen only on the loopback.
        """
        if ipaddress.ip_address(self.here.address).is_loopback:
            return
        if not self.joined:
            problem = f"Ray listens at {self.here.address} instead of the loopback"
        elif not ray_is_guarded():
            problem = f"the Ray cluster at {address} asks for no token, so that whoever reaches it "
            problem += "could start processes and read the keys of the run; start Ray and launch with "
            problem += "the same RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
        else:
            return
        self.close()
        raise LaunchError(problem)

    def nodes(self) -> list[Node]:
        """The nodes that are alive."""
        return [_node(entry) for entry in ray.nodes() if entry["Alive"]]

    def check_head(self) -> None:
        """Raises LaunchError when the head process of a cluster started here has died.

        Any call to Ray after that blocks, until Ray ends this process without a message of ours.
        """
        if self.joined or time.monotonic() < self._next_check:
            return
        self._next_check = time.monotonic() + _CHECK_SECONDS
        try:
            _check_listens(self._head)
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
            ray.shutdown()
        if self.scratch is not None:
            shutil.rmtree(self.scratch, ignore_errors=True)


def _join(address: str) -> None:
    _be_quiet()
    _check_listens(address)
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)


def _short_folder(log_dir: Path) -> Path | None:
    """A new folder for Ray where the path of sockets in ``log_dir`` would be too long."""
    if len(str(log_dir / "ray")) + _SESSION_PATH <= SOCKET_PATH_LIMIT:
        return None
    return Path(tempfile.mkdtemp(prefix="lockstep-ray-", dir="/tmp"))


def _start(folder: Path, num_cpus: int) -> None:
    _be_quiet()
    if ray.is_initialized():
        raise RuntimeError("this process has joined a Ray cluster already")
    ray.init(
        address="local",
        num_cpus=num_cpus,
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _node_ip_address="127.0.0.1",
        _temp_dir=str(folder),
    )
    _end_helpers()


def _be_quiet() -> None:
    logging.getLogger("ray").setLevel(logging.ERROR)


def _end_helpers() -> None:
    """Ends three processes of the cluster just started: the autoscaler, as one machine has nothing
    to scale; the reader of logs, which reads ours; the dashboard's server, which has no dashboard.

    They would take CPU time from the start and memory for as long as it runs, and ray.shutdown
    would wait a second for the autoscaler: it ends the head first, and then the autoscaler does not
    answer SIGTERM. ``ray.init`` cannot leave them out, so Ray's own object for this node ends its
    own children, as ray.shutdown would. A Ray without one of these methods keeps that process.
    """
    own_node: Any = ray._private.worker._global_node
    for method in ("kill_monitor", "kill_log_monitor", "kill_dashboard"):
        with contextlib.suppress(AttributeError):
            getattr(own_node, method)(check_alive=False)


def _node(entry: dict[str, Any]) -> Node:
    resources = entry["Resources"]
    return Node(
        id=str(entry["NodeID"]),
        name=str(entry["NodeManagerHostname"]),
        address=str(entry["NodeManagerAddress"]),
        cpus=resources.get("CPU", 0.0),
        gpus=int(resources.get("GPU", 0)),
    )


def _check_listens(address: str) -> None:
    """Raises OSError or ValueError when nothing listens at ``address``.

    Ray itself would try for two minutes.
    """
    if address == "auto":
        return
    host, colon, port = address.rpartition(":")
    if not colon or "/" in host or not port.isdecimal():
        raise ValueError("should be host:port of its head node, or auto")
    socket.create_connection((host, int(port)), timeout=5.0).close()
