"""The rooms of a run in a Ray cluster: bundles of placement groups, one for the ranks of each node,
one beside the launcher.
"""

from __future__ import annotations

import ipaddress
import time
from dataclasses import dataclass

import ray
from ray.exceptions import GetTimeoutError
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from .cluster import LaunchError
from .ray_session import Node, RaySession

_RETRY = 0.2
_ROOM_SECONDS = 2.0  # in which Ray must find a node with room while the launcher waits


@dataclass(frozen=True)
class Room:
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


class Rooms:
    """A room of ``ranks_per_node`` ranks on each of ``num_nodes`` nodes, ``of_ranks``, and one of
    ``num_beside`` other tasks on the launcher's node. ``share``: Ray's resources of a room of
    ranks. ``gpus_per_node``: those of the node that has most.

    When a node is lost, Ray moves its room to a node with room: a spare one, one that comes back,
    or one that has a room of this run already. Raises LaunchError when Ray has no room within
    ``deadline`` seconds.
    """

    def __init__(self, session: RaySession, needs: Needs, deadline: float) -> None:
        self._session = session
        self._deadline = deadline
        self._groups: list[PlacementGroup] = []
        self._left: set[str] = set()  # ids of nodes on which ranks kept dying
        self.gpus_per_node = max(node.gpus for node in session.nodes())
        use_gpus = self.gpus_per_node > 0 if needs.gpus is None else needs.gpus
        self.share = dict.fromkeys(("CPU", "GPU") if use_gpus else ("CPU",), float(needs.ranks_per_node))
        if needs.num_nodes > 1:
            self._check_address(needs.num_nodes)
        try:
            self._reserve(needs.num_nodes, {"CPU": float(needs.num_beside)})
        except BaseException:
            self.close()
            raise

    @property
    def nodes(self) -> list[Node]:
        """The node of each group of ranks, in the order of the groups."""
        by_id = {node.id: node for node in self._session.nodes()}
        return [by_id[node] for node in (room.node for room in self.of_ranks) if node in by_id]

    def _check_address(self, num_nodes: int) -> None:
        address = self._session.here.address
        if address.startswith("127."):
            raise LaunchError(
                f"cluster.nodes = {num_nodes}: this node is {address} in the Ray cluster, which other "
                "nodes cannot reach; start Ray with --node-ip-address and an address that they can reach"
            )

    def _reserve(self, num_nodes: int, beside: dict[str, float]) -> None:
        """Reserves room for the tasks beside the launcher, then a bundle per node of ranks."""
        here = self._session.here
        group = placement_group([beside | {f"node:{here.address}": 0.001}], strategy="STRICT_PACK")
        self._groups.append(group)
        what = f"controller and frontend ({_text(beside)}) on {here}, the launcher's node"
        self._await(group, what, time.monotonic() + self._deadline)
        self._spread = self._spread_over(num_nodes)
        self._groups.append(self._spread)
        self.of_ranks = [Room(self._spread, bundle) for bundle in self._in_order(_nodes_of(self._spread))]

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
        what = f"{num_nodes} x {_text(self.share)} for the ranks"
        end = time.monotonic() + self._deadline
        while True:
            group: PlacementGroup = placement_group([self.share] * num_nodes, strategy="SPREAD")
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
        return LaunchError(f"Ray found no room for {what} in {self._deadline:g} s; {self.free()}")

    def free(self) -> str:
        """The resources of the nodes and the free ones, as text."""
        nodes = ", ".join(
            f"{node}: {node.cpus:g} CPU" + (f", {node.gpus} GPU" if node.gpus else "")
            for node in self._session.nodes()
        )
        return f"the cluster has {nodes}; free are {_text(ray.available_resources())}"

    @property
    def size(self) -> str:
        """The resources of the room of a node's ranks, as text."""
        return _text(self.share)

    def is_found(self, room: Room) -> bool:
        """Whether Ray has found a node for it."""
        return str(placement_group_table(room.group)["state"]) == "CREATED"

    def leave_node(self, node: int) -> str:
        """Moves the room of a group to another node, as ``Cluster.leave_node`` does. The one on the
        node that is left stays reserved, so that no other group comes there.
        """
        taken = self._left | {room.node for room in self.of_ranks}
        others = {other.id: other for other in self._session.nodes() if other.id not in taken}
        if not others:
            return ""
        self._left.add(self.of_ranks[node].node)
        group = self._room_outside(taken)
        try:
            ray.get(group.ready(), timeout=_ROOM_SECONDS)
        except GetTimeoutError:
            remove_placement_group(group)
            self._left.remove(self.of_ranks[node].node)
            return ""
        self._enter(node, group)
        found = others.get(self.of_ranks[node].node)
        return "another node" if found is None else f"{found}"

    def _room_outside(self, nodes: set[str]) -> PlacementGroup:
        """Asks for room for the ranks of a node on one that is not of these."""
        group: PlacementGroup = placement_group(
            [self.share], bundle_label_selector=[{"ray.io/node-id": f"!in({','.join(sorted(nodes))})"}]
        )
        return group

    def _enter(self, node: int, group: PlacementGroup) -> None:
        self._groups.append(group)
        self.of_ranks[node] = Room(group, 0)

    def lose(self, node: int) -> None:
        """Handles the loss of a group's node. Ray finds another for a bundle that was spread; one
        that has left its first node may now share any other.
        """
        room = self.of_ranks[node]
        moved = room.group != self._spread
        if moved and str(placement_group_table(room.group)["state"]) == "RESCHEDULING":
            remove_placement_group(room.group)
            self._enter(node, self._room_outside(self._left))

    def close(self) -> None:
        """Gives the rooms back. Raises RayError when Ray is gone."""
        for group in self._groups:
            remove_placement_group(group)
        self._groups.clear()


def _nodes_of(group: PlacementGroup) -> list[str]:
    """Node id of every bundle."""
    bundles = placement_group_table(group)["bundles_to_node_id"]
    return [str(bundles[index]) for index in sorted(bundles)]


def _text(resources: dict[str, float]) -> str:
    named = {name: amount for name, amount in resources.items() if name in ("CPU", "GPU")}
    return ", ".join(f"{amount:g} {name}" for name, amount in sorted(named.items())) or "nothing"
