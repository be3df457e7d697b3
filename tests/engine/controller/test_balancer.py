"""The balancer: skewed reports become moves by whole layers, a commit changes the placement from
its step on, and ranks with another placement are told.
"""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import numpy as np
import pytest
from msgspec import structs
from numpy.typing import NDArray

from lockstep.engine.controller.balancer import Balancer
from lockstep.engine.controller.pilot import Pilot
from lockstep.engine.controller.status import ClusterStatus
from lockstep.engine.planner.group_plan import GroupPlan
from lockstep.engine.planner.settings import Settings
from lockstep.engine.protocol.bulk import RankHello
from lockstep.engine.protocol.plan import Header, Mode
from lockstep.engine.protocol.results import StepResult
from lockstep.engine.protocol.specs import SchedulerSpec
from lockstep.moe.balance.balance import Limits, balance, imbalance, weighted_imbalance
from lockstep.moe.balance.placement import Placement, contiguous
from lockstep.parallel.mesh import Mesh

MESH = Mesh(pipeline=2, data=2)
LAYERS, SLOTS, EXPERTS = 3, 4, 8  # of a stage


class Cluster:
    def __init__(
        self,
        *,
        enabled: bool = True,
        mesh: Mesh = MESH,
        sizes: tuple[int, int, int] = (LAYERS, SLOTS, EXPERTS),
    ) -> None:
        self.mesh, (layers, slots, experts) = mesh, sizes
        spec = SchedulerSpec(max_running=4, max_batch_tokens=32)
        self.pilot = Pilot(Settings(mesh, spec, [40] * mesh.data, 4, 96))
        self.hellos = {
            rank: RankHello(rank, "host", rank, 40, 4, 0, layers, slots, "cpu", experts, expert_bytes=100)
            for rank in range(mesh.world)
        }
        self.status = ClusterStatus(mesh, self.hellos, self.pilot.group, itertools.count(1))
        self.balancer = Balancer(mesh, self.hellos, self.status.experts, self.pilot, enabled=enabled)

    def report_loads(self, step: int, loads_LE: NDArray[np.int64]) -> None:
        """Every rank of one stage counts the tokens of its own slots."""
        counts_LWS = loads_LE[np.arange(len(loads_LE))[:, None, None], self.status.experts.newest.experts_LWS]
        for rank in range(self.mesh.world):
            packed = np.ascontiguousarray(counts_LWS[:, rank]).tobytes()
            self.status.observe([StepResult(0, 0, step, rank, expert_i64=packed)])
        self.status.add_up()
        self.status.state([])

    def report(self, step: int, factor: int = 1) -> None:
        """Rank 0 of the first stage has the hot experts; the second stage is even."""
        for rank in range(4):
            counts_LS = np.full((LAYERS, SLOTS), 1000 * factor)
            if rank == 0:
                counts_LS[:2] *= [[9], [3]]
            packed = np.ascontiguousarray(counts_LS, np.int64).tobytes()
            self.status.observe([StepResult(0, 0, step, rank, expert_i64=packed)])
        self.status.add_up()
        self.status.state([])

    def look(self) -> None:
        """Looks until the search that it may have started has ended."""
        self.balancer.look()
        deadline = time.monotonic() + 30
        while self.balancer._search is not None and time.monotonic() < deadline:
            self.balancer.look()

    def commit(self, step: int) -> None:
        """Starts all moves, lets them land, and plans the step that commits them."""
        moves = self.pilot.group.moves
        ids: list[int] = []
        while moves.num_open:
            started, commits = moves.plan(border=False, first=False)
            ids += [part.id for part in started]
            for part in started:
                for rank in self.mesh.stage_ranks(part.stage):
                    moves.landed(StepResult(0, 0, step, rank, landed_i32=np.array(ids, np.int32).tobytes()))
            if not started:
                _, commits = moves.plan(border=True, first=False)
                header = Header(0, 0, step, step - 1, Mode.DECODE, 1, commits=commits)
                self.balancer.planned(GroupPlan(header, {}))


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


def test_skewed_loads_become_moves_and_a_commit_changes_the_placement(cluster: Cluster) -> None:
    experts, before = cluster.status.experts, cluster.status.experts.newest
    cluster.report(63)
    cluster.look()
    assert cluster.pilot.group.moves.num_open and experts.newest is before, "nothing is committed"
    cluster.commit(128)
    after = experts.newest
    changed = (after.experts_LWS != before.experts_LWS).any(axis=(1, 2))
    assert changed.tolist() == [True, True, False, False, False, False], "the others are even"
    loads_LE = experts.loads_LE.astype(float)
    assert imbalance(loads_LE, before)[:2].min() > 1.4 and imbalance(loads_LE, after).max() < 1.03
    cluster.report(127)
    assert experts.placement is before, "counts of steps before the commit"
    cluster.report(191)
    assert experts.placement is after
    assert cluster.status.state([]).placement_version == cluster.pilot.group.moves.committed > 0


def test_nothing_moves_while_a_data_index_is_away_nor_by_a_search_from_before(cluster: Cluster) -> None:
    cluster.report(63)
    cluster.balancer.look()
    assert cluster.balancer._search is not None
    cluster.status.experts.place(64, Placement(cluster.status.experts.newest.experts_LWS.copy(), EXPERTS))
    cluster.pilot.place_experts(1)
    cluster.look()
    assert not cluster.pilot.group.moves.num_open, "the search was for another placement"
    cluster.pilot.begin_epoch([1])
    cluster.report(127)
    cluster.look()
    assert not cluster.pilot.group.moves.num_open, "nobody is there to receive"
    cluster.pilot.begin_epoch([])
    cluster.report(191)
    cluster.look()
    assert cluster.pilot.group.moves.num_open
    assert cluster.pilot.group.moves.plan(border=False, first=False)[0][0].id == 2, "placement 1 was loaded"


def test_a_search_that_fails_and_a_rank_of_another_form_end_the_moves_and_say_so(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise MemoryError("no room for a table")

    monkeypatch.setattr("lockstep.engine.controller.balancer._balance_stages", fails)
    cluster.report(63)
    cluster.look()
    assert cluster.balancer.stopped == "experts no longer move: MemoryError: no room for a table"
    cluster.report(127)
    cluster.look()
    assert not cluster.pilot.group.moves.num_open
    other = Cluster()
    other.balancer.joined(structs.replace(other.hellos[1], expert_form="bfloat16 24x16x16x2"))
    assert "rank 1 on host holds bfloat16 24x16x16x2, others " in other.balancer.stopped
    other.report(63)
    other.look()
    assert not other.pilot.group.moves.num_open


def test_a_stage_without_experts_holds_them_in_no_other_form() -> None:
    cluster = Cluster()
    cluster.balancer.joined(structs.replace(cluster.hellos[2], expert_form="bfloat16 24x16x16x2"))
    assert cluster.balancer.stopped, "the form of the others is known"
    hellos = {
        rank: structs.replace(hello, expert_form="" if rank < 2 else "bfloat16 24x16x16x2")
        for rank, hello in Cluster().hellos.items()
    }
    pilot, experts = cluster.pilot, cluster.status.experts
    assert Balancer(MESH, hellos, experts, pilot, enabled=True).stopped == ""


def test_balanced_loads_few_tokens_and_a_recipe_that_says_off_move_nothing(cluster: Cluster) -> None:
    cluster.report(63)
    cluster.look()
    cluster.commit(128)
    version = cluster.pilot.group.moves.committed
    off = Cluster(enabled=False)
    off.report(63)
    off.look()
    assert not off.pilot.group.moves.num_open
    few = Cluster()
    for rank in range(4):
        counts = np.full((LAYERS, SLOTS), 10 * (1 + 9 * (rank == 0)), np.int64)
        few.status.observe([StepResult(0, 0, 63, rank, expert_i64=counts.tobytes())])
    few.status.add_up()
    few.status.state([])
    few.look()
    assert not few.pilot.group.moves.num_open
    cluster.look()
    assert cluster.pilot.group.moves.num_open == 0 and cluster.pilot.group.moves.committed == version


def _family_loads() -> NDArray[np.float64]:
    """Share of each expert by family and layer, [F, L, E], of the demo's routing trace."""
    path = Path(__file__).parents[3] / "recipes" / "demo" / "routing_trace.npz"
    with np.load(path) as trace:
        counts_SLE, tokens_SF = trace["counts_SLE"][::4], trace["tokens_SF"][::4].astype(float)
    flat, _, _, _ = np.linalg.lstsq(tokens_SF, counts_SLE.reshape(len(counts_SLE), -1).astype(float))
    loads_FLE = np.maximum(flat, 0.0).reshape(-1, *counts_SLE.shape[1:])
    return np.asarray(loads_FLE / loads_FLE.sum(axis=2, keepdims=True))


def test_every_family_is_within_a_twentieth_of_the_solver_s_answer_in_200_steps() -> None:
    """A commit takes until the next report. The fourth report since the change is the last of the
    200 steps; the four after it are judged.
    """
    families, dice = _family_loads(), np.random.default_rng(18)
    cluster = Cluster(mesh=Mesh(pipeline=1, data=4), sizes=(4, 8, 32))
    step, ratios = -1, []
    for family_LE in families:
        judged: list[NDArray[np.int64]] = []
        for number in range(8):
            counts_LE = np.stack([dice.multinomial(9600, share_E) for share_E in family_LE])
            step += 64
            cluster.report_loads(step, counts_LE)
            if number >= 4:
                judged.append(counts_LE)
                continue
            cluster.commit(step + 1)
            cluster.look()
        loads_LE = np.sum(judged, axis=0).astype(float)
        solved = balance(loads_LE, contiguous(4, 32, 4), Limits(target=1.0)).placement
        here = weighted_imbalance(loads_LE, cluster.status.experts.newest)
        ratios.append(here / weighted_imbalance(loads_LE, solved))
    assert max(ratios) < 1.05, ratios
