"""Processes on a Ray cluster: groups of ranks, one per node, and processes beside the launcher."""

from __future__ import annotations

import contextlib
import ipaddress
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayError
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ..environment import ray_address
from ..recipe.recipe import Recipe
from .cluster import Death, LaunchError, Place, Task
from .ray_host import START_SECONDS, RayHost
from .ray_session import Node, RaySession

NOWHERE = Place("a node still to be found", 0, "")
_RETRY = 0.2
_PLACE_SECONDS = 5.0  # for Ray's worker processes to start
_ROOM_SECONDS = 2.0  # for Ray to find a node with room, while the launcher does nothing else
_ATTEMPTS = 3


@dataclass
class _Held:
    """A process as the driver sees it: its actor, and its place once that is known."""

    task: Task
    actor: Any
    placed: Any
    ended: Any
    attempts: int
    place: Place = NOWHERE


@dataclass(frozen=True)
class _Room:
    """The bundle of a placement group in which tasks run."""

    group: PlacementGroup
    bundle: int

    @property
    def node(self) -> str:
        """The node's id; that of a lost node until Ray has found another."""
        return _nodes_of(self.group)[self.bundle]


@dataclass(frozen=True)
class Needs:
    """Resources that a recipe needs. ``gpus``: one per rank, or None to use those there are."""

    num_nodes: int
    ranks_per_node: int
    gpus: bool | None
    num_beside: int = 2


def needs_of(recipe: Recipe) -> Needs:
    """Resources of a recipe; controller and frontends run beside the launcher."""
    gpus = {"auto": None, "cpu": False, "cuda": True}[recipe.cluster.device]
    return Needs(recipe.cluster.nodes, recipe.cluster.ranks_per_node, gpus, 1 + recipe.frontend.processes)


class RayCluster:
    """Runs ``num_nodes`` groups of ``ranks_per_node`` ranks, one group per node, and ``num_beside``
    other tasks on the launcher's node.

    When a node is lost, Ray moves its group to a node with room: a spare one, one that comes back,
    or one that has a group already. Tasks started meanwhile wait for it, see ``waiting``. Raises
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
        self._deadline = deadline
        self._held: dict[str, _Held] = {}
        self._groups: list[PlacementGroup] = []
        self._left: set[str] = set()  # ids of nodes on which ranks kept dying
        num_nodes, ranks_per_node = needs.num_nodes, needs.ranks_per_node
        if num_nodes > 1 and (address or ray_address()) is None:
            raise LaunchError(
                f"cluster.nodes = {num_nodes}: needs a Ray cluster to join; "
                "name it in cluster.address or RAY_ADDRESS"
            )
        num_cpus = num_nodes * ranks_per_node + needs.num_beside
        self._session = RaySession(log_dir, address=address, num_cpus=num_cpus)
        try:
            mark("Ray")
            self.host = self._session.here.address
            self.gpus_per_node = max(node.gpus for node in self._session.nodes())
            use_gpus = self.gpus_per_node > 0 if needs.gpus is None else needs.gpus
            self._share = dict.fromkeys(("CPU", "GPU") if use_gpus else ("CPU",), float(ranks_per_node))
            if num_nodes > 1:
                self._check_address(num_nodes)
            self._reserve(num_nodes, needs.num_beside)
            if {node.id for node in self.nodes} == {self._session.here.id}:
                self.host = "127.0.0.1"  # all runs on this machine, and ends with it
            mark("placement")
        except BaseException:
            self.close()
            raise

    @property
    def scratch(self) -> Path | None:
        """Ray's folder outside the log folder, if any; to be deleted at the end."""
        return self._session.scratch

    @property
    def nodes(self) -> list[Node]:
        """The node of each group of ranks, in the order of the groups."""
        by_id = {node.id: node for node in self._session.nodes()}
        return [by_id[node] for node in (room.node for room in self._rooms) if node in by_id]

    @property
    def here(self) -> Node:
        """The launcher's node."""
        return self._session.here

    def _check_address(self, num_nodes: int) -> None:
        if self.host.startswith("127."):
            raise LaunchError(
                f"cluster.nodes = {num_nodes}: this node is {self.host} in the Ray cluster, which other "
                "nodes cannot reach; start Ray with --node-ip-address and an address that they can reach"
            )

    def _reserve(self, num_nodes: int, num_beside: int) -> None:
        """Reserves room for the tasks beside the launcher, then a bundle per node of ranks."""
        beside = {"CPU": float(num_beside)}
        group = placement_group([beside | {f"node:{self.host}": 0.001}], strategy="STRICT_PACK")
        self._groups.append(group)
        what = f"controller and frontend ({_text(beside)}) on {self._session.here}, the launcher's node"
        self._await(group, what, time.monotonic() + self._deadline)
        self._beside = _Room(group, 0)
        self._spread = self._spread_over(num_nodes)
        self._groups.append(self._spread)
        self._rooms = [_Room(self._spread, bundle) for bundle in self._in_order(_nodes_of(self._spread))]

    def _in_order(self, places: list[str]) -> list[int]:
        """Bundle of each group of ranks: the launcher's node first, the others by address."""
        address = {node.id: int(ipaddress.ip_address(node.address)) for node in self._session.nodes()}
        return sorted(
            range(len(places)),
            key=lambda bundle: (places[bundle] != self._session.here.id, address[places[bundle]]),
        )

    def _spread_over(self, num_nodes: int) -> PlacementGroup:
        """Reserves a bundle on each of ``num_nodes`` nodes.

        The strategy is SPREAD, not STRICT_SPREAD, so that the bundle of a lost node may go to a
        node that has one already. At the start none may, so the outcome is checked.
        """
        what = f"{num_nodes} x {_text(self._share)} for the ranks"
        end = time.monotonic() + self._deadline
        while True:
            group: PlacementGroup = placement_group([self._share] * num_nodes, strategy="SPREAD")
            self._await(group, what, end)
            found = len(set(_nodes_of(group)))
            if found == num_nodes:
                return group
            remove_placement_group(group)
            if time.monotonic() > end:
                raise self._no_room(f"{what} on {num_nodes} nodes, only on {found}")
            time.sleep(_RETRY)

    def _await(self, group: PlacementGroup, what: str, end: float) -> None:
        try:
            ray.get(group.ready(), timeout=max(_RETRY, end - time.monotonic()))
        except GetTimeoutError:
            remove_placement_group(group)
            raise self._no_room(what) from None

    def _no_room(self, what: str) -> LaunchError:
        return LaunchError(f"Ray found no room for {what} in {self._deadline:g} s; {self._room()}")

    def _room(self) -> str:
        nodes = ", ".join(
            f"{node}: {node.cpus:g} CPU" + (f", {node.gpus} GPU" if node.gpus else "")
            for node in self._session.nodes()
        )
        return f"the cluster has {nodes}; free are {_text(ray.available_resources())}"

    # ------------------------------------------------------------------ processes

    def start(self, tasks: Sequence[Task]) -> None:
        for task in tasks:
            assert task.name not in self._held, f"{task.name} runs already"
            self._hold(task, attempts=1)

    def _hold(self, task: Task, attempts: int) -> None:
        actor = self._actor(task)
        self._held[task.name] = _Held(task, actor, actor.place.remote(), actor.wait.remote(), attempts)

    def _actor(self, task: Task) -> Any:
        room = self._beside if task.node is None else self._rooms[task.node]
        strategy = PlacementGroupSchedulingStrategy(
            placement_group=room.group, placement_group_bundle_index=room.bundle
        )
        options = ray.remote(RayHost).options(
            num_cpus=1,
            num_gpus=task.num_gpus,
            max_concurrency=8,
            max_restarts=0,
            scheduling_strategy=strategy,
        )
        return options.remote(task, str(self._log_dir))

    def running(self) -> list[tuple[Task, Place]]:
        starting = [
            held.placed for held in self._held.values() if held.place is NOWHERE and self._has_room(held.task)
        ]
        if starting:
            ray.wait(starting, num_returns=len(starting), timeout=_PLACE_SECONDS)
        self._look()
        return [(held.task, held.place) for held in self._held.values() if held.place is not NOWHERE]

    def waiting(self) -> str:
        """Started tasks that wait for a node, and the room there is; empty if none waits."""
        self._look()
        names = [
            held.task.name
            for held in self._held.values()
            if held.place is NOWHERE and not self._has_room(held.task)
        ]
        if not names:
            return ""
        return f"no node has room for {', '.join(names)} ({_text(self._share)} a node); {self._room()}"

    def _has_room(self, task: Task) -> bool:
        """Whether the bundle of the task's group is on a node."""
        if task.node is None:
            return True
        return str(placement_group_table(self._rooms[task.node].group)["state"]) == "CREATED"

    def leave_node(self, node: int) -> str:
        """The room on the node that is left stays reserved, so that no other group comes there."""
        taken = self._left | {room.node for room in self._rooms}
        others = {other.id: other for other in self._session.nodes() if other.id not in taken}
        if not others:
            return ""
        self._left.add(self._rooms[node].node)
        group = self._room_outside(taken)
        try:
            ray.get(group.ready(), timeout=_ROOM_SECONDS)
        except GetTimeoutError:
            remove_placement_group(group)
            self._left.remove(self._rooms[node].node)
            return ""
        self._enter(node, group)
        found = others.get(self._rooms[node].node)
        return "another node" if found is None else f"{found}"

    def _room_outside(self, nodes: set[str]) -> PlacementGroup:
        """Asks for room for the ranks of a node on one that is not of these."""
        group: PlacementGroup = placement_group(
            [self._share], bundle_label_selector=[{"ray.io/node-id": f"!in({','.join(sorted(nodes))})"}]
        )
        return group

    def _enter(self, node: int, group: PlacementGroup) -> None:
        self._groups.append(group)
        self._rooms[node] = _Room(group, 0)

    def _lose(self, node: int) -> None:
        """The node of a group of ranks is lost. Ray finds another for a bundle that was spread; one
        that has left its first node may now share any other.
        """
        room = self._rooms[node]
        moved = room.group != self._spread
        if moved and str(placement_group_table(room.group)["state"]) == "RESCHEDULING":
            remove_placement_group(room.group)
            self._enter(node, self._room_outside(self._left))

    def _look(self) -> None:
        """Reads the places of processes that had to wait for a node."""
        for held in self._held.values():
            if held.place is NOWHERE and ray.wait([held.placed], timeout=0)[0]:
                with contextlib.suppress(RayError):  # its death says so
                    held.place = ray.get(held.placed)

    def deaths(self) -> list[Death]:
        """Raises LaunchError when Ray itself is gone."""
        self._session.check_head()
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
        lost_node = ""
        try:
            code, tail = ray.get(held.ended)
        except ActorUnavailableError:
            # The connection broke; Ray does not know yet whether node or actor is lost, or neither.
            held.ended = held.actor.wait.remote()
            return None
        except RayError as error:
            if held.place is NOWHERE and held.attempts < _ATTEMPTS:  # its node was lost just before
                self._hold(held.task, held.attempts + 1)
                return None
            code, tail = None, _one_line(error)
            if held.place.node and held.place.node not in alive:
                lost_node = f"{held.place.host} ({held.place.address})"
                if held.task.node is not None:
                    self._lose(held.task.node)
        del self._held[held.task.name]
        ray.kill(held.actor)
        return Death(held.task, held.place, code, tail, lost_node)

    def signal(self, task: Task, number: int) -> None:
        if task.name in self._held:
            self._held[task.name].actor.signal.remote(number)

    def close(self) -> None:
        if not self._session.lost:
            self._end_all()
        self._session.close()

    def _end_all(self) -> None:
        self._look()
        for name, held in list(self._held.items()):
            if held.place is NOWHERE:
                ray.kill(held.actor)
                del self._held[name]
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


def _nodes_of(group: PlacementGroup) -> list[str]:
    """Node id of every bundle."""
    bundles = placement_group_table(group)["bundles_to_node_id"]
    return [str(bundles[index]) for index in sorted(bundles)]


def _text(resources: dict[str, float]) -> str:
    named = {name: amount for name, amount in resources.items() if name in ("CPU", "GPU")}
    return ", ".join(f"{amount:g} {name}" for name, amount in sorted(named.items())) or "nothing"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500]
