"""Losses, replacements and hangs of ranks, in a clock that a test sets."""

from __future__ import annotations

import itertools

import pytest

from lockstep.engine.controller.hang_detector import GRACE
from lockstep.engine.controller.membership import Membership
from lockstep.engine.controller.pilot import Pilot
from lockstep.engine.controller.status import ClusterStatus
from lockstep.engine.planner.settings import Settings
from lockstep.engine.protocol.bulk import RankHello, StepProgress
from lockstep.engine.protocol.frontends import RankLost, Rejected, Submit
from lockstep.engine.protocol.message import Sampling
from lockstep.engine.protocol.results import Abandoned, StepResult
from lockstep.parallel.mesh import Mesh
from support.engine.controller_spec import SCHEDULER, controller_spec

MESH = Mesh(data=2)
SPEC = controller_spec(MESH, survivors=False)


def hello(rank: int, pages: int = 40) -> RankHello:
    return RankHello(rank, f"host{rank}", 100 + rank, pages, 4, 0, 0, 0, "cpu")


class Group:
    def __init__(self) -> None:
        self.pilot = Pilot(Settings(MESH, SCHEDULER, [40, 40], 4, 96))
        self.status = ClusterStatus(MESH, {0: hello(0)}, self.pilot.group, itertools.count(1))
        self.membership = Membership(SPEC, {1: hello(1), 0: hello(0)}, self.pilot, self.status)
        self.membership.answered([StepResult(0, 0, 0, rank) for rank in range(2)])

    @property
    def epoch(self) -> int:
        return self.pilot.group.steps.epoch

    def conditions(self) -> list[str]:
        """The condition of each rank, as frontends are told."""
        ranks = self.status.state(self.membership.conditions()).ranks
        assert [(rank.rank, rank.host) for rank in ranks] == [(0, "host0"), (1, "host1")]
        return [rank.state for rank in ranks]

    def owe(self, *ranks: int) -> None:
        """A plan is in flight, and ``ranks`` have not answered it."""
        steps = self.pilot.group.steps
        steps.next_step += 1
        for rank in set(range(MESH.world)) - set(ranks):
            steps.acknowledged[rank] = steps.last_step


@pytest.fixture
def group() -> Group:
    return Group()


def test_a_lost_rank_begins_an_epoch_and_its_replacement_ends_the_recovery(group: Group) -> None:
    group.membership.lost(RankLost(1, "it was killed"), 10.0)
    assert (group.epoch, group.status.phase) == (1, "recovering")
    assert group.status.reason == "rank 1 is lost: it was killed"
    assert group.conditions() == ["serving", "lost"] and group.membership.lost_ranks == {1}
    group.membership.replaced(hello(1), 15.0)
    assert (group.epoch, group.status.phase, group.status.reason) == (1, "serving", "")
    assert group.conditions() == ["serving", "serving"]
    assert group.membership.watch(100.0) == "", "the deadline of the replacement is over"


def test_recovery_lasts_until_the_last_replacement(group: Group) -> None:
    for rank in (1, 0):
        group.membership.lost(RankLost(rank, "its node is lost"), 10.0)
    group.membership.replaced(hello(0), 11.0)
    assert (group.status.phase, group.conditions()) == ("recovering", ["serving", "lost"])
    group.membership.replaced(hello(1), 12.0)
    assert group.status.phase == "serving"


def test_a_group_that_drains_goes_on_draining(group: Group) -> None:
    group.status.phase = "draining"
    group.membership.lost(RankLost(1, "it was killed"), 10.0)
    assert (group.epoch, group.status.phase) == (1, "draining")
    group.membership.replaced(hello(1), 11.0)
    assert group.status.phase == "draining"


def test_after_the_end_a_loss_is_only_noted(group: Group) -> None:
    group.status.phase = "failed"
    group.membership.lost(RankLost(1, "it was killed"), 10.0)
    assert (group.epoch, group.status.phase, group.conditions()) == (0, "failed", ["serving", "lost"])
    assert group.membership.watch(1000.0) == ""


def test_the_pool_shrinks_to_a_replacement_with_fewer_pages(group: Group) -> None:
    group.pilot.submit(0, Submit(1, "fits no more", bytes(4 * 10), b"", 96, Sampling()))
    group.pilot.submit(0, Submit(2, "fits", bytes(4 * 10), b"", 20, Sampling()))
    group.pilot.follow_up()
    group.membership.lost(RankLost(1, "it was killed"), 10.0)
    group.membership.replaced(hello(1, pages=10), 11.0)
    assert group.membership.lost_ranks == set() and group.pilot.group.max_len == 40
    assert group.pilot.group.kv.num_pages.tolist() == [40, 10]
    messages = [message for _, message in group.pilot.take_output()]
    [rejected] = [message for message in messages if isinstance(message, Rejected)]
    assert rejected.handle == 1 and "holds 40 tokens" in rejected.reason
    group.pilot.planner.check()
    for _ in range(3):
        group.pilot.follow_up()
    group.pilot.planner.check()
    assert [handle for _, handle in group.pilot.group.open] == [2]


def test_a_replacement_that_stays_away_ends_the_group(group: Group) -> None:
    group.membership.lost(RankLost(1, "it was killed"), 10.0)
    assert group.membership.watch(30.0) == ""
    expected = "rank 1 is lost: it was killed; no replacement for ranks [1] within 20 s"
    assert group.membership.watch(30.1) == expected


def test_a_hung_rank_is_named_and_has_to_be_replaced(group: Group) -> None:
    assert group.membership.watch(10.0) == "", "no rank owes a result"
    group.owe(0, 1)
    group.membership.abandoned(Abandoned(0, 0, 0, 0, "no answer from rank 1"), 16.0)
    assert group.membership.watch(16.0 + GRACE / 2) == "" and group.conditions() == ["serving", "serving"]
    assert group.membership.watch(16.0 + GRACE) == "" and group.conditions() == ["serving", "hung"]
    assert group.status.reason == "rank 1 hangs in step 0"
    assert group.membership.watch(30.0) == ""
    assert group.membership.watch(30.1) == "ranks [1] hang and have not been replaced"
    group.membership.lost(RankLost(1, "it was killed"), 31.0)
    assert group.conditions() == ["serving", "lost"]


def test_ranks_that_all_abandoned_get_a_new_epoch(group: Group) -> None:
    group.owe(0, 1)
    group.membership.abandoned(Abandoned(0, 7, 0, 0, "of another epoch"), 10.0)
    for rank in range(2):
        group.membership.abandoned(Abandoned(0, 0, rank, 0, "no answer"), 16.0)
    assert group.membership.watch(16.0 + GRACE) == ""
    assert group.epoch == 1 and group.conditions() == ["serving", "serving"]


def test_a_rank_that_says_hello_again_begins_an_epoch_and_nothing_is_sent_for_a_moment(group: Group) -> None:
    group.owe(0, 1)
    group.membership.returned(hello(1), 10.0)
    assert group.epoch == 1
    assert 0.0 < group.membership.pause(10.0) <= 1.0
    group.membership.returned(hello(0), 10.1)
    assert group.epoch == 1, "nothing was sent meanwhile"
    assert group.membership.pause(11.2) == 0.0
    group.membership.returned(hello(1), 12.0)
    assert (group.epoch, group.status.phase, group.conditions()) == (2, "serving", ["serving", "serving"])


def test_a_hello_of_another_process_is_a_replacement_though_its_loss_was_not_reported(group: Group) -> None:
    successor = RankHello(1, "host1", 999, 40, 4, 0, 0, 0, "cpu", life=7)
    group.membership.returned(successor, 10.0)
    assert (group.epoch, group.status.phase, group.conditions()) == (1, "recovering", ["serving", "lost"])
    group.membership.replaced(successor, 10.0)
    assert (group.epoch, group.status.phase, group.conditions()) == (1, "serving", ["serving", "serving"])
    group.membership.lost(RankLost(1, "it was killed", pid=101), 11.0)  # reported late
    assert group.membership.lost_ranks == set()
    group.membership.lost(RankLost(1, "it was killed", pid=999), 12.0)
    assert group.membership.lost_ranks == {1}


def test_a_standstill_of_the_controller_moves_deadlines_on(group: Group) -> None:
    group.membership.lost(RankLost(1, "it was killed"), 10.0)
    group.membership.stood_still(60.0, 75.0)
    assert group.membership.watch(80.0) == ""
    assert "no replacement for ranks [1] within 20 s" in group.membership.watch(90.1)


def test_ranks_that_all_abandoned_go_on_at_once(group: Group) -> None:
    group.owe(0, 1)
    for rank in range(2):
        group.membership.abandoned(Abandoned(0, 0, rank, 0, "no answer"), 16.0)
    assert group.membership.watch(16.1) == "" and group.epoch == 1


def test_health_tells_of_a_rank_that_stands_still_and_of_its_moving_again(group: Group) -> None:
    group.membership.watch(10.0)
    group.owe(0, 1)
    group.membership.progressed(StepProgress(0, 0, 0, 7), 20.0)
    assert group.membership.watch(20.5) == ""
    reason = "rank 1 on host1 stood still for 10 s in the middle of a step"
    assert (group.status.phase, group.status.reason) == ("recovering", reason)
    assert group.conditions() == ["serving", "serving"], "it is not to be killed"
    group.membership.progressed(StepProgress(1, 0, 0, 8), 21.0)
    assert group.membership.watch(21.0) == ""
    assert (group.status.phase, group.status.reason) == ("serving", "")


def test_a_replacement_is_cold_until_it_answers(group: Group) -> None:
    group.membership.lost(RankLost(1, "it was killed"), 10.0)
    assert group.membership.cold == set()
    group.membership.replaced(hello(1), 11.0)
    assert group.membership.cold == {1}
    group.membership.answered([StepResult(0, 1, 0, 1)])
    assert group.membership.cold == set()
