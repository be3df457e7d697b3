"""Processes on a Ray cluster: one that this launcher starts on its machine, or one that it joins.

Every process is held by an actor of its own. The actor only starts the process, waits for it and passes signals on:
the process itself stays free of Ray's threads and of its allocator. It dies with its actor, and actors die with
their driver.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from .child import Child
from .cluster import Death, LaunchError, Place, Task
from .environment import ray_address

OBJECT_STORE_BYTES = 100 * 2**20  # nothing but a few small results goes through it
SOCKET_PATH_LIMIT = 107
_SESSION_PATH = 70  # what Ray puts below its folder: /session_<date, time, pid>/sockets/plasma_store
START_SECONDS = 60.0


class Host:
    """The actor that holds one process. ``wait`` occupies one of its two threads, signals take the other."""

    def __init__(self, task: Task, log_dir: str | None) -> None:
        self._task = task
        folder = Path(log_dir) if log_dir is not None and Path(log_dir).is_dir() else Path(tempfile.mkdtemp(prefix="lockstep-"))
        self._child: Child | None = None
        self._started, self._ended = threading.Event(), threading.Event()
        threading.Thread(target=self._run, args=(folder,), daemon=True).start()  # a thread that stays: see Child

    def _run(self, folder: Path) -> None:
        self._child = Child(self._task, folder)
        self._started.set()
        self._child.process.wait()
        self._ended.set()

    def place(self) -> Place:
        assert self._started.wait(START_SECONDS) and self._child is not None, f"{self._task.name} was not started"
        return Place(socket.gethostname(), self._child.pid, str(self._child.log))

    def wait(self) -> tuple[int, str]:
        """Blocks until the process ends; returns its exit status and the last lines it wrote."""
        self._ended.wait()
        assert self._child is not None
        return self._child.process.returncode, self._child.tail()

    def signal(self, number: int) -> None:
        if self._child is not None:
            self._child.signal(number)


class _Held:
    """The driver's view of a Host."""

    def __init__(self, task: Task, actor: Any, place: Place) -> None:
        self.task = task
        self.actor = actor
        self.place = place
        self.ended = actor.wait.remote()


class RayCluster:
    """``num_nodes`` groups of ``ranks_per_node`` ranks, each group on a node of its own; other tasks run beside the launcher.

    ``scratch`` is where Ray keeps its sockets and logs when they cannot be with the logs of the run, because their path would
    be too long for a socket. Raises LaunchError when Ray cannot be started or reached, or has no room within ``deadline`` seconds.
    """

    def __init__(
        self,
        log_dir: Path,
        *,
        address: str | None,
        num_nodes: int,
        ranks_per_node: int,
        gpus: bool | None,
        deadline: float = START_SECONDS,
    ) -> None:
        self._log_dir = log_dir
        self._deadline = deadline
        self._held: dict[str, _Held] = {}
        self._groups: list[PlacementGroup] = []
        self.scratch: Path | None = None
        address = address or ray_address()
        self._joined = address is not None
        if num_nodes > 1 and not self._joined:
            raise LaunchError(f"cluster.nodes = {num_nodes}: needs a Ray cluster to join; name it in cluster.address or RAY_ADDRESS")
        num_tasks = num_nodes * ranks_per_node + 2
        try:
            self._connect(address, num_tasks)
            node = ray.get_runtime_context().get_node_id()
            self.host = str(next(n["NodeManagerAddress"] for n in ray.nodes() if n["NodeID"] == node))
        except (RayError, ConnectionError, OSError, RuntimeError, ValueError, TimeoutError) as error:
            where = f"the Ray cluster at {address} cannot be reached" if self._joined else "Ray cannot be started on this machine"
            hint = "; where it asks for a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN" if self._joined else ""
            raise LaunchError(f"{where}: {' '.join(str(error).split())[:500]}{hint}") from error
        self.gpus_per_node = max(int(n["Resources"].get("GPU", 0)) for n in ray.nodes() if n["Alive"])
        use_gpus = self.gpus_per_node > 0 if gpus is None else gpus
        ranks = {"CPU": float(ranks_per_node)} | ({"GPU": float(ranks_per_node)} if use_gpus else {})
        try:
            self._reserve(ranks, num_nodes)
        except BaseException:
            self.close()
            raise

    def _connect(self, address: str | None, num_tasks: int) -> None:
        logging.getLogger("ray").setLevel(logging.ERROR)
        common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "include_dashboard": False}
        if address is not None:
            del common["include_dashboard"]
            _knock(address)
            ray.init(address=address, **common)
            return
        if ray.is_initialized():
            raise RuntimeError("this process has joined a Ray cluster already")
        folder = self._log_dir / "ray"
        if len(str(folder)) + _SESSION_PATH > SOCKET_PATH_LIMIT:
            self.scratch = folder = Path(tempfile.mkdtemp(prefix="lockstep-ray-", dir="/tmp"))
        ray.init(
            address="local",
            num_cpus=num_tasks,
            object_store_memory=OBJECT_STORE_BYTES,
            _node_ip_address="127.0.0.1",
            _temp_dir=str(folder),
            **common,
        )

    def _reserve(self, ranks: dict[str, float], num_nodes: int) -> None:
        """Room for the tasks beside the launcher, then a bundle per node of ranks; each waits for its deadline."""
        self._groups.append(placement_group([{"CPU": 2, f"node:{self.host}": 0.001}], strategy="STRICT_PACK"))
        self._groups.append(placement_group([ranks] * num_nodes, strategy="STRICT_SPREAD"))
        for group, what in zip(self._groups, ("controller and frontend", f"{num_nodes} x {_text(ranks)} for the ranks"), strict=True):
            try:
                ray.get(group.ready(), timeout=self._deadline)
            except GetTimeoutError:
                raise LaunchError(
                    f"Ray found no room for {what} in {self._deadline:g} s; the cluster has {_text(ray.cluster_resources())}, "
                    f"free are {_text(ray.available_resources())}"
                ) from None

    def start(self, tasks: Sequence[Task]) -> None:
        actors = [self._actor(task) for task in tasks]
        places = [actor.place.remote() for actor in actors]
        for task, actor, place in zip(tasks, actors, places, strict=True):
            assert task.name not in self._held, f"{task.name} runs already"
            try:
                self._held[task.name] = _Held(task, actor, ray.get(place, timeout=self._deadline))
            except (GetTimeoutError, RayError) as error:
                raise LaunchError(f"{task.name}: its Ray actor did not start: {' '.join(str(error).split())[:500]}") from error

    def _actor(self, task: Task) -> Any:
        group, bundle = (self._groups[0], 0) if task.node is None else (self._groups[1], task.node)
        strategy = PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=bundle)
        options = ray.remote(Host).options(
            num_cpus=1, num_gpus=task.num_gpus, max_concurrency=2, max_restarts=0, scheduling_strategy=strategy
        )
        return options.remote(task, str(self._log_dir))

    def running(self) -> list[tuple[Task, Place]]:
        return [(held.task, held.place) for held in self._held.values()]

    def deaths(self) -> list[Death]:
        refs = {held.ended: name for name, held in self._held.items()}
        if not refs:
            return []
        ended, _ = ray.wait(list(refs), num_returns=len(refs), timeout=0)
        return [self._bury(refs[ref]) for ref in ended]

    def _bury(self, name: str) -> Death:
        held = self._held.pop(name)
        code: int | None
        try:
            code, tail = ray.get(held.ended)
        except RayError as error:
            code, tail = None, " ".join(str(error).split())[:500]
        ray.kill(held.actor)
        return Death(held.task, held.place, code, tail)

    def signal(self, task: Task, number: int) -> None:
        if task.name in self._held:
            self._held[task.name].actor.signal.remote(number)

    def close(self) -> None:
        for held in self._held.values():
            held.actor.signal.remote(signal.SIGKILL)
        deadline = time.monotonic() + 5.0
        while self._held and time.monotonic() < deadline:
            if not self.deaths():
                time.sleep(0.02)
        for held in self._held.values():
            ray.kill(held.actor)  # takes the process with it
        self._held.clear()
        with contextlib.suppress(RayError):
            for group in self._groups:
                remove_placement_group(group)
        ray.shutdown()
        if self.scratch is not None:
            shutil.rmtree(self.scratch, ignore_errors=True)


def _knock(address: str) -> None:
    """Raises OSError or ValueError for an address where nothing listens; Ray itself would try for two minutes."""
    if address == "auto":
        return
    host, colon, port = address.rpartition(":")
    if not colon or "/" in host or not port.isdecimal():
        raise ValueError("should be host:port of its head node, or auto")
    socket.create_connection((host, int(port)), timeout=5.0).close()


def _text(resources: dict[str, float]) -> str:
    named = {name: amount for name, amount in resources.items() if name in ("CPU", "GPU")}
    return ", ".join(f"{amount:g} {name}" for name, amount in sorted(named.items())) or "nothing"
