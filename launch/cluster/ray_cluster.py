"""Groups of ranks on a Ray cluster, one per node, and processes beside the launcher."""

from __future__ import annotations

import contextlib
import itertools
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ..environment import ray_address
from ..recipe.recipe import Recipe
from .cluster import Death, Imports, LaunchError, Place, Task
from .local import LocalCluster
from .ray_host import RayHost
from .ray_rooms import Needs, Room, Rooms
from .ray_session import Node, RaySession

NOWHERE = Place("a node still to be found", 0, "")
START_SECONDS = 60.0
_PLACE_SECONDS = 5.0  # for Ray's worker processes to start
_ATTEMPTS = 3
_CALLS = 4  # at a time for each process of an actor: it starts, is waited for, is signalled


@dataclass
class _Held:
    """A process of the group ``node`` as the driver sees it: the actor that holds it under
    ``number``, and its place once that is known.
    """

    task: Task
    node: int
    actor: Any
    number: int
    placed: Any
    ended: Any
    attempts: int
    place: Place = NOWHERE


def needs_of(recipe: Recipe) -> Needs:
    """Resources of a recipe; controller and frontends run beside the launcher."""
    gpus = {"auto": None, "cpu": False, "cuda": True}[recipe.cluster.device]
    return Needs(recipe.cluster.nodes, recipe.cluster.ranks_per_node, gpus, 1 + recipe.frontend.processes)


class RayCluster:
    """Runs groups of ranks, one group per node, in ``Rooms`` as large as the recipe ``needs``. One
    actor holds the ranks of a node. Other tasks run beside the launcher and end with it, so that no
    actor needs to hold them; Ray keeps room for them.

    Tasks that are started while their room has no node wait for it, see ``waiting``. Raises
    LaunchError when Ray cannot be started or reached, or has no room within ``deadline`` seconds.
    Calls ``mark`` at the end of every phase of the start.
    """

    def __init__(
        self,
        log_dir: Path,
        needs: Needs,
        *,
        address: str | None,
        deadline: float = START_SECONDS,
        mark: Callable[[str], None] = lambda phase: None,
    ) -> None:
        self._log_dir = log_dir
        self._held: dict[str, _Held] = {}
        self._beside = LocalCluster(log_dir)
        self._numbers = itertools.count()
        self._hosts: dict[Room, Any] = {}  # the actor of each room where processes run
        if needs.num_nodes > 1 and (address or ray_address()) is None:
            raise LaunchError(
                f"cluster.nodes = {needs.num_nodes}: needs a Ray cluster to join; "
                "name it in cluster.address or RAY_ADDRESS"
            )
        num_cpus = needs.num_nodes * needs.ranks_per_node + needs.num_beside
        self._session = RaySession(log_dir, address=address, num_cpus=num_cpus)
        try:
            mark("Ray")
            self._rooms = Rooms(self._session, needs, deadline)
        except BaseException:
            self._session.close()
            raise
        self.gpus_per_node = self._rooms.gpus_per_node
        here = self._session.here
        alone = {node.id for node in self.nodes} == {here.id}
        self.host = "127.0.0.1" if alone else here.address  # all runs on this machine, and ends with it
        mark("placement")

    @property
    def scratch(self) -> Path | None:
        """Ray's folder outside the log folder, if any; to be deleted at the end."""
        return self._session.scratch

    @property
    def nodes(self) -> list[Node]:
        """The node of each group of ranks, in the order of the groups."""
        return self._rooms.nodes

    @property
    def here(self) -> Node:
        """The launcher's node."""
        return self._session.here

    # ------------------------------------------------------------------ processes

    def prepare(self, imports: Imports) -> None:
        for room in self._rooms.of_ranks:
            self._host_in(room).prepare.remote(imports)

    def start(self, tasks: Sequence[Task]) -> None:
        self._beside.start([task for task in tasks if task.node is None])
        for task in tasks:
            if task.node is not None:
                assert task.name not in self._held, f"{task.name} runs already"
                self._hold(task, task.node, attempts=1)

    def _hold(self, task: Task, node: int, attempts: int) -> None:
        actor = self._host_in(self._rooms.of_ranks[node])
        number = next(self._numbers)
        placed = actor.start.remote(number, task)
        ended = actor.wait.remote(number)
        self._held[task.name] = _Held(task, node, actor, number, placed, ended, attempts)

    def _host_in(self, room: Room) -> Any:
        """The actor of a room's ranks; it has all of the room's GPUs."""
        if room not in self._hosts:
            share = self._rooms.share
            strategy = PlacementGroupSchedulingStrategy(
                placement_group=room.group, placement_group_bundle_index=room.bundle
            )
            options = ray.remote(RayHost).options(
                num_cpus=share["CPU"],
                num_gpus=share.get("GPU", 0.0),
                max_concurrency=_CALLS * int(share["CPU"]),
                max_restarts=0,
                scheduling_strategy=strategy,
            )
            self._hosts[room] = options.remote(str(self._log_dir))
        return self._hosts[room]

    def running(self) -> list[tuple[Task, Place]]:
        starting = [
            held.placed for held in self._held.values() if held.place is NOWHERE and self._has_room(held)
        ]
        if starting:
            ray.wait(starting, num_returns=len(starting), timeout=_PLACE_SECONDS)
        self._look()
        found = [(held.task, held.place) for held in self._held.values() if held.place is not NOWHERE]
        return self._beside.running() + found

    def waiting(self) -> str:
        """Started tasks that wait for a node, and the room there is; empty if none waits."""
        self._look()
        names = [
            held.task.name
            for held in self._held.values()
            if held.place is NOWHERE and not self._has_room(held)
        ]
        return (
            f"no node has room for {', '.join(names)} ({self._rooms.size} a node); {self._rooms.free()}"
            if names
            else ""
        )

    def _has_room(self, held: _Held) -> bool:
        return self._rooms.is_found(self._rooms.of_ranks[held.node])

    def leave_node(self, node: int) -> str:
        return self._rooms.leave_node(node)

    def _look(self) -> None:
        """Reads the places of processes that had to wait for a node."""
        for held in self._held.values():
            if held.place is NOWHERE and ray.wait([held.placed], timeout=0)[0]:
                with contextlib.suppress(RayError):  # its death will report it
                    held.place = ray.get(held.placed)

    def deaths(self) -> list[Death]:
        """Raises LaunchError when Ray itself is gone."""
        self._session.check_head()
        return self._beside.deaths() + self._deaths_of_ranks()

    def _deaths_of_ranks(self) -> list[Death]:
        self._look()
        refs = {held.ended: name for name, held in self._held.items()}
        if not refs:
            return []
        ended, _ = ray.wait(list(refs), num_returns=len(refs), timeout=0)
        alive = {node.id for node in self._session.nodes()} if ended else set()
        return [death for ref in ended if (death := self._bury(self._held[refs[ref]], alive)) is not None]

    def _bury(self, held: _Held, alive: set[str]) -> Death | None:
        """The death of a process that has ended; None if Ray does not know that yet."""
        code: int | None
        try:
            code, tail, lost_with = ray.get(held.ended)
        except ActorUnavailableError:
            # The connection broke; Ray does not know yet whether node or actor is lost, or neither.
            held.ended = held.actor.wait.remote(held.number)
            return None
        except RayTaskError as error:  # it did not start
            code, tail, lost_with = None, _one_line(error.cause), ""
        except RayError as error:
            self._drop(held.actor)
            if held.place is NOWHERE and held.attempts < _ATTEMPTS:  # its node was lost just before
                self._hold(held.task, held.node, held.attempts + 1)
                return None
            place = held.place
            code, tail, lost_with = None, _one_line(error), f"the Ray actor on {place.host}"
            if place.node and place.node not in alive:
                lost_with = f"the node {place.host} ({place.address})"
                self._rooms.lose(held.node)
        del self._held[held.task.name]
        return Death(held.task, held.place, code, tail, lost_with)

    def _drop(self, actor: Any) -> None:
        """Drops a lost actor; the next process in its room gets another."""
        for room in [room for room, host in self._hosts.items() if host is actor]:
            del self._hosts[room]
            ray.kill(actor)

    def signal(self, task: Task, number: int) -> None:
        if task.node is None:
            self._beside.signal(task, number)
        elif held := self._held.get(task.name):
            held.actor.signal.remote(held.number, number)

    def close(self) -> None:
        self._beside.close()
        if not self._session.lost:
            self._end_all()
        self._session.close()

    def _end_all(self) -> None:
        self._look()
        for name, held in list(self._held.items()):
            if held.place is NOWHERE:
                del self._held[name]
            else:
                held.actor.signal.remote(held.number, signal.SIGKILL)
        deadline = time.monotonic() + 5.0
        while self._held and time.monotonic() < deadline:
            if not self._deaths_of_ranks():
                time.sleep(0.02)
        for actor in self._hosts.values():
            ray.kill(actor)  # takes processes with it
        self._held.clear()
        with contextlib.suppress(RayError):
            self._rooms.close()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500]
