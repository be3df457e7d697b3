"""Survivors of a loss: they load what they lack, go on, and take the replacement in later."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from msgspec import structs

from lockstep.engine.controller.membership import Membership
from lockstep.engine.controller.pilot import Pilot
from lockstep.engine.controller.status import ClusterStatus
from lockstep.engine.planner.settings import Settings
from lockstep.engine.protocol.bulk import RankHello
from lockstep.engine.protocol.frontends import RankLost
from lockstep.moe.balance.placement import Placement
from lockstep.moe.balance.start import starting_placement
from lockstep.parallel.mesh import Mesh
from support.engine.controller_spec import SCHEDULER, controller_spec

LAYERS, EXPERTS = 3, 8


class Cluster:
    """A group of ranks with ``redundant`` expert slots, and hellos as ranks would say them."""

    def __init__(
        self, mesh: Mesh, redundant: int, *, survivors: bool = True, recovery: str = "regroup"
    ) -> None:
        self.mesh = mesh
        placement = starting_placement(LAYERS * mesh.pipeline, EXPERTS, mesh.experts, redundant)
        self.pilot = Pilot(Settings(mesh, SCHEDULER, [40] * mesh.data, 4, 96))
        self.hellos = {
            rank: RankHello(
                rank,
                f"host{rank}",
                100 + rank,
                40,
                4,
                0,
                LAYERS,
                placement.num_slots,
                "cpu",
                EXPERTS,
                recovery=recovery,
            )
            for rank in range(mesh.world)
        }
        numbers, packed = itertools.count(1), placement.experts_LWS.tobytes()
        self.status = ClusterStatus(mesh, self.hellos, self.pilot.group, numbers, packed)
        spec = controller_spec(mesh, survivors=survivors)
        self.membership = Membership(spec, self.hellos, self.pilot, self.status)
        self.survivors = self.membership.survivors

    def lose(self, rank: int, now: float = 10.0) -> None:
        self.membership.lost(RankLost(rank, "it was killed"), now)

    def hello(self, rank: int, version: int) -> RankHello:
        return structs.replace(self.hellos[rank], placement_version=version)

    def load(self, now: float = 11.0) -> list[int]:
        """The ranks that were told to load another placement do so. Returns them."""
        orders = self.survivors.take_orders()
        for rank, place in orders:
            experts_LWS = np.frombuffer(place.placement_i32, np.int32).reshape(-1, self.mesh.experts, 4)
            Placement(experts_LWS, EXPERTS)
            self.membership.returned(self.hello(rank, place.version), now)
        return [rank for rank, _ in orders]

    @property
    def vacant(self) -> tuple[int, ...]:
        return self.pilot.group.steps.vacant


def test_survivors_with_replicas_go_on_at_once_and_the_replacement_joins() -> None:
    cluster = Cluster(Mesh(data=2), redundant=8)
    cluster.lose(1)
    assert cluster.survivors.take_orders() == [] and cluster.vacant == (1,)
    assert cluster.membership.pause(10.0) == 0.0 and cluster.status.phase == "serving"
    assert cluster.status.state([]).degraded == (
        "rank 1 on host1 lost; 1 of 2 data indices serve until it is replaced"
    )
    epoch = cluster.pilot.group.steps.epoch
    assert cluster.membership.watch(1000.0) == "", "nobody waits for the replacement"
    cluster.membership.replaced(cluster.hello(1, 0), 1000.0)
    assert cluster.vacant == () and cluster.pilot.group.steps.epoch == epoch + 1
    assert cluster.status.state([]).degraded == ""


def test_experts_that_only_the_lost_rank_had_are_loaded_first() -> None:
    cluster = Cluster(Mesh(data=4), redundant=6)
    cluster.lose(3)
    assert cluster.membership.pause(10.0) > 0 and cluster.status.phase == "recovering"
    assert cluster.load() == [0, 1, 2]
    assert cluster.membership.pause(11.0) == 0.0 and cluster.vacant == (3,)
    assert cluster.survivors.is_behind(cluster.hello(3, 0)), "the replacement loads the placement, too"
    cluster.membership.replaced(cluster.hello(3, 1), 20.0)
    assert cluster.vacant == () and cluster.status.phase == "serving"


def test_ranks_that_never_load_end_the_group_and_are_named() -> None:
    cluster = Cluster(Mesh(data=4), redundant=6)
    cluster.lose(3)
    assert cluster.membership.watch(30.0) == ""
    assert "ranks [0, 1, 2] have not loaded their experts" in cluster.membership.watch(30.1)


def test_a_rank_whose_connection_was_away_is_told_again() -> None:
    cluster = Cluster(Mesh(data=4), redundant=6)
    cluster.lose(3)
    cluster.survivors.take_orders()
    cluster.membership.returned(cluster.hello(1, 0), 11.0)
    assert [rank for rank, _ in cluster.survivors.take_orders()] == [1]
    for rank in range(3):
        cluster.membership.returned(cluster.hello(rank, 1), 12.0)
    assert cluster.vacant == (3,)


def test_a_second_loss_that_leaves_too_few_slots_waits_for_either_replacement() -> None:
    cluster = Cluster(Mesh(data=4), redundant=6)
    cluster.lose(3)
    cluster.load()
    cluster.lose(1, 12.0)
    cluster.lose(0, 12.5)
    assert cluster.membership.pause(13.0) > 0 and "rank 0" in cluster.status.reason
    version = cluster.pilot.group.moves.committed
    cluster.membership.replaced(cluster.hello(3, version), 14.0)
    cluster.load()
    assert cluster.vacant == (0, 1) and cluster.membership.pause(15.0) == 0.0
    cluster.membership.replaced(cluster.hello(0, cluster.pilot.group.moves.committed), 16.0)
    assert cluster.vacant == (1,)


def test_a_loss_while_others_load_is_covered_too() -> None:
    cluster = Cluster(Mesh(data=4), redundant=6)
    cluster.lose(3)
    assert len(cluster.survivors.take_orders()) == 3
    cluster.membership.returned(cluster.hello(0, 1), 11.0)
    cluster.lose(2, 11.5)
    assert cluster.load(12.0) == [0, 1]
    assert cluster.vacant == (2, 3) and cluster.membership.pause(12.0) == 0.0


def test_all_ranks_of_a_data_index_are_away_and_come_back_together() -> None:
    cluster = Cluster(Mesh(pipeline=2, data=2, tensor=2), redundant=8)
    cluster.lose(3)  # the first stage's; its data index has ranks 2, 3, 6 and 7
    assert set(cluster.load()) == set(range(8)) - {3}
    assert cluster.vacant == (2, 3)
    cluster.lose(6, 12.0)
    assert cluster.vacant == (2, 3) and cluster.membership.pause(12.0) == 0.0, "it was away anyway"
    version = cluster.pilot.group.moves.committed
    cluster.membership.replaced(cluster.hello(3, version), 13.0)
    assert cluster.vacant == (2, 3)
    cluster.membership.replaced(cluster.hello(6, version), 14.0)
    assert cluster.vacant == ()


@pytest.mark.parametrize(
    "why", ["too few slots", "the last data index", "the recipe", "symmetric memory", "dense"]
)
def test_all_wait_where_they_cannot_go_on(why: str) -> None:
    cluster = Cluster(
        Mesh(data=1, tensor=2) if why == "the last data index" else Mesh(data=2, dense=2 * (why == "dense")),
        redundant=4 if why == "too few slots" else 8,
        survivors=why != "the recipe",
        recovery="process restart" if why == "symmetric memory" else "regroup",
    )
    cluster.lose(1)
    assert cluster.membership.pause(10.0) > 0 and cluster.survivors.take_orders() == []
    assert "no replacement" in cluster.membership.watch(31.0)
    cluster.membership.replaced(cluster.hello(1, 0), 32.0)
    assert cluster.vacant == () and cluster.membership.pause(32.0) == 0.0
