"""Lost nodes and the replacement of their ranks: a real roster, a scripted cluster."""

from __future__ import annotations

import time
from typing import Any

import pytest
from msgspec import structs

from lockstep.engine.protocol.cluster_state import ClusterState, RankState, Report
from lockstep.launch.cluster.cluster import Death, LaunchError, Place, Task
from lockstep.launch.run.replacements import Replacements
from lockstep.launch.run.roster import Roster
from lockstep.launch.terminal.interrupts import Interrupts

BETA = "the node beta (10.0.0.3)"


class ScriptedCluster:
    """Answers as the test has set it up."""

    host, gpus_per_node = "10.0.0.2", 0

    def __init__(self) -> None:
        self.started: list[str] = []
        self.room, self.dead = "", [lost(1)]

    def start(self, tasks: list[Task]) -> None:
        self.started += [task.name for task in tasks]

    def waiting(self) -> str:
        return self.room

    def deaths(self) -> list[Death]:
        found, self.dead = self.dead, []
        return found

    def running(self) -> list[tuple[Task, Place]]:
        return []

    def signal(self, task: Task, number: int) -> None: ...

    def close(self) -> None: ...


class ScriptedDesk:
    def __init__(self) -> None:
        self.reports: list[Report] = []

    def read(self, timeout: float) -> list[Report]:
        found, self.reports = self.reports, []
        return found


def lost(index: int, node: str = BETA, role: str = "rank") -> Death:
    return Death(
        Task(role, index, b"", node=1), Place("beta", 100 + index, ""), None, "ActorDiedError: gone", node
    )


def roster(cluster: ScriptedCluster, desk: ScriptedDesk) -> Roster:
    return Roster(cluster, desk, Interrupts(), lambda name, report: None)  # type: ignore[arg-type]


def state(phase: str, epoch: int) -> ClusterState:
    zeros: Any = dict.fromkeys(
        ("step", "num_running", "num_waiting", "prompt_tokens", "generation_tokens"), 0
    )
    rest = {
        "prefix_queries": 0,
        "prefix_hits": 0,
        "preemptions": 0,
        "steps": 0,
        "imbalance": 1.0,
        "plan_seconds": 0.0,
        "kv_usage": 0.0,
    }
    return ClusterState(
        phase=phase, reason="", max_len=16, page_size=4, prefix_caching=True, epoch=epoch, **zeros, **rest
    )


def test_all_that_went_with_a_node_is_one_line_and_the_rest_a_line_each() -> None:
    killed = Death(Task("rank", 0, b""), Place("alpha", 7, ""), -9, "")
    gone = Death(Task("rank", 4, b""), Place("gamma", 9, ""), None, "OSError: no more processes")
    found = roster(ScriptedCluster(), ScriptedDesk()).causes(
        [lost(10), killed, lost(2), lost(3, "the node gamma (10.0.0.4)"), gone]
    )
    assert [(line, [death.task.index for death in deaths]) for line, deaths in found] == [
        (f"{BETA} was lost, and with it rank 2, rank 10", [10, 2]),
        ("rank 0 on alpha (pid 7) was killed by SIGKILL (the kernel does this when memory runs out)", [0]),
        ("the node gamma (10.0.0.4) was lost, and with it rank 3", [3]),
        ("rank 4 on gamma (pid 9) could not be started: OSError: no more processes", [4]),
    ]


def test_the_loss_of_a_node_while_starting_is_the_error() -> None:
    with pytest.raises(LaunchError, match=r"^the node beta \(10\.0\.0\.3\) was lost, and with it rank 1$"):
        roster(ScriptedCluster(), ScriptedDesk()).wait(["rank 0"], 5.0)


def test_a_start_that_takes_too_long_says_where_there_is_no_room() -> None:
    cluster = ScriptedCluster()
    cluster.dead, cluster.room = [], "no node has room for rank 0"
    with pytest.raises(
        LaunchError, match=r"not ready after 0\.1 s: rank 0 \(has not reported\); no node has room for rank 0"
    ):
        roster(cluster, ScriptedDesk()).wait(["rank 0"], 0.1)


def test_the_slowest_is_the_one_that_was_ready_last() -> None:
    cluster, desk = ScriptedCluster(), ScriptedDesk()
    cluster.dead = []
    watched = roster(cluster, desk)
    for index, host in ((1, "beta"), (0, "alpha"), (2, "gamma")):
        desk.reports = [Report("rank", index, host, 1, "ready")]
        watched.read(0.0)
        time.sleep(0.002)
    desk.reports = [Report("rank", 1, "beta", 1, "ready")]  # a second report changes nothing
    watched.read(0.0)
    assert watched.slowest(["rank 0", "rank 1"]) == "slowest: rank 0 on alpha"
    watched.forget("rank 2")
    assert watched.slowest(["rank 1"]) == "slowest: rank 1 on beta"


def test_compiling_lasts_until_the_next_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, desk, now = ScriptedCluster(), ScriptedDesk(), [10.0]
    cluster.dead = []
    watched = roster(cluster, desk)
    monkeypatch.setattr("lockstep.launch.run.roster.time.monotonic", lambda: now[0])
    for index, phase, seconds in (
        (0, "starting", 1.0),
        (0, "compiling", 20.0),
        (1, "compiling", 15.0),
        (0, "compiling", 5.0),
        (0, "loading", 2.0),
        (1, "loading", 2.0),
        (0, "ready", 0.0),
    ):
        desk.reports = [Report("rank", index, "host", 1, phase)]
        watched.read(0.0)
        now[0] += seconds
    assert watched.seconds_compiling(["rank 0"]) == 40.0
    assert watched.seconds_compiling(["rank 0", "rank 1"]) == 40.0
    assert watched.seconds_compiling(["rank 1"]) == 22.0
    assert watched.seconds_compiling(["controller 0"]) == 0.0


def test_a_wait_for_room_and_its_end_are_told_once() -> None:
    cluster = ScriptedCluster()
    replacements = Replacements(cluster, 60.0)
    assert replacements.news() == ""
    replacements.replace(lost(1), "beta was lost", epoch=3)
    assert cluster.started == ["rank 1"]
    cluster.room = "no node has room for rank 1"
    assert (
        replacements.news()
        == "no node has room for rank 1; waiting up to 60 s for a node to join or come back"
    )
    assert replacements.news() == ""
    cluster.room = ""
    assert replacements.news() == "a node with room has been found"
    assert replacements.news() == ""
    assert replacements.recovered(state("serving", 3)) is None
    assert replacements.recovered(state("serving", 4)) is not None


def test_a_death_beside_ranks_that_serve_without_it_begins_no_pause_that_cannot_end() -> None:
    cluster = ScriptedCluster()
    replacements = Replacements(cluster, 0.0)
    rank = RankState(1, "beta", 101, "lost", 0, 0, 0, 0, 0.0, 0.0)
    without = structs.replace(
        state("serving", 4), ranks=(structs.replace(rank, rank=0, state="serving"), rank)
    )
    replacements.replace(lost(1), "rank 1 was killed", epoch=4)  # the replacement, while it loads
    assert replacements.recovered(without) is not None, "no epoch follows: nobody waits for it"
    replacements.replace(lost(0), "rank 0 was killed", epoch=4)
    with pytest.raises(LaunchError, match="does not serve again"):
        replacements.recovered(without)  # the state has not heard of it
    other = Replacements(cluster, 0.0)
    other.replace(lost(1), "rank 1 was killed", epoch=4)
    other.replace_controller(killed("controller", 0), "the controller was killed", epoch=4)
    with pytest.raises(LaunchError, match="does not serve again"):
        other.recovered(without)  # the state is of the controller that died


def test_without_room_until_the_deadline_the_error_says_so() -> None:
    cluster = ScriptedCluster()
    replacements = Replacements(cluster, 0.05)
    replacements.replace(lost(1), "beta was lost", epoch=3)
    cluster.room = "no node has room for rank 1"
    replacements.news()
    time.sleep(0.06)
    with pytest.raises(
        LaunchError,
        match=r"^beta was lost; the cluster does not serve again after 0\.05 s: no node has room for rank 1$",
    ):
        replacements.recovered(state("recovering", 3))


def killed(name: str = "rank", index: int = 1) -> Death:
    return Death(Task(name, index, b""), Place("alpha", 1, ""), -9, "")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_losing_nodes_again_and_again_is_no_fault_of_the_rank() -> None:
    cluster = ScriptedCluster()
    replacements = Replacements(cluster, 60.0)
    for _ in range(5):
        replacements.replace(lost(1), "beta was lost", epoch=0)
    assert cluster.started == ["rank 1"] * 5


def test_a_rank_that_keeps_dying_is_replaced_after_growing_delays() -> None:
    cluster, clock = ScriptedCluster(), Clock()
    replacements = Replacements(cluster, 60.0, clock)
    delays = []
    for count in range(1, 12):
        delays.append(replacements.replace(killed(), "it died while loading or later", epoch=count))
        clock.now += delays[-1]
        replacements.start_due()
        assert cluster.started == ["rank 1"] * count
        assert replacements.recovered(state("serving", count + 1)) is not None
    assert delays[:7] == [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 20.0] and max(delays) == 20.0
    clock.now += 601.0
    assert replacements.replace(killed(), "it died", epoch=0) == 0.0, "those deaths are long ago"


def test_a_controller_that_keeps_dying_is_replaced_while_the_cluster_comes_back_in_time() -> None:
    cluster, clock = ScriptedCluster(), Clock()
    replacements = Replacements(cluster, 60.0, clock)
    delays = [replacements.replace_controller(killed("controller", 0), "it died", epoch=3) for _ in range(6)]
    assert delays == [0.0, 1.0, 2.0, 4.0, 5.0, 5.0]
    assert replacements.recovered(state("recovering", 3)) is None
    clock.now += 60.5
    with pytest.raises(LaunchError, match=r"^it died; the cluster does not serve again after 60 s$"):
        replacements.recovered(state("recovering", 3))


def test_a_standstill_of_the_launcher_takes_no_time_from_replacements() -> None:
    cluster, clock = ScriptedCluster(), Clock()
    replacements = Replacements(cluster, 60.0, clock)
    replacements.stood_still(5.0)
    replacements.replace(killed(), "it died", epoch=3)
    replacements.replace_frontend(killed("frontend", 0), others=True)
    clock.now += 500.0
    replacements.stood_still(499.0)
    assert replacements.recovered(state("recovering", 4)) is None and not replacements.slow_frontends(set())
    clock.now += 59.5
    assert replacements.slow_frontends(set()) == ["frontend 0"]
    with pytest.raises(LaunchError, match="does not serve again after 60 s"):
        replacements.recovered(state("recovering", 3))
    assert replacements.recovered(state("serving", 4)) == 559.5, "the pause as requests have met it"


def test_a_frontend_that_keeps_dying_is_replaced_after_growing_delays_and_never_given_up() -> None:
    cluster, clock = ScriptedCluster(), Clock()
    replacements = Replacements(cluster, 60.0, clock)
    delays = []
    for count in range(1, 41):
        delays.append(replacements.replace_frontend(killed("frontend", 0), others=True))
        clock.now += delays[-1] / 2
        replacements.start_due()
        assert len(cluster.started) == count - bool(delays[-1]), "it was started before its delay was over"
        clock.now += delays[-1] / 2
        replacements.start_due()
        assert cluster.started == ["frontend 0"] * count
    assert delays[:9] == [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0] and max(delays) == 60.0
    clock.now += 600.0
    assert replacements.replace_frontend(killed("frontend", 0), others=True) == 0.0
    assert replacements.recovered(None) is None, "requests do not wait for a frontend"


def test_the_only_frontend_is_never_kept_waiting_for_long() -> None:
    cluster, clock = ScriptedCluster(), Clock()
    replacements = Replacements(cluster, 60.0, clock)
    delays = [replacements.replace_frontend(killed("frontend", 0), others=False) for _ in range(6)]
    assert delays == [0.0, 1.0, 2.0, 4.0, 5.0, 5.0]


def test_missing_frontends_are_named_until_they_are_ready() -> None:
    cluster, clock = ScriptedCluster(), Clock()
    replacements = Replacements(cluster, 60.0, clock)
    assert replacements.degraded() == ""
    replacements.replace_frontend(killed("frontend", 1), others=True)
    replacements.replace_frontend(killed("frontend", 0), others=True)
    replacements.replace_frontend(killed("frontend", 0), others=True)
    often = "frontend 0 is being replaced (it died 2 times within 600 s)"
    assert replacements.degraded() == f"{often}, frontend 1 is being replaced"
    assert replacements.slow_frontends({"frontend 1"}) == [] and replacements.degraded() == often
    clock.now += 60.5
    assert replacements.slow_frontends(set()) == [], "it was started a second after its death"
    clock.now += 1.0
    assert replacements.slow_frontends(set()) == ["frontend 0"]
    assert replacements.slow_frontends({"frontend 0"}) == [] and replacements.degraded() == ""


def test_the_obituary_of_a_process_that_the_launcher_killed_says_so() -> None:
    watched = roster(ScriptedCluster(), ScriptedDesk())
    death = killed()
    assert watched.kill_expected(death.place, "hangs in the middle of a step")
    assert not watched.kill_expected(death.place, "hangs again"), "it is killed once"
    why = "was killed by the launcher: it hangs in the middle of a step"
    assert watched.cause(death) == f"rank 1 on alpha (pid 1) {why}"
    other = Death(death.task, Place("alpha", 2, ""), -9, "")
    assert watched.cause(other).endswith("was killed by SIGKILL (the kernel does this when memory runs out)")


def test_reports_of_a_replaced_process_that_come_late_are_not_of_its_successor() -> None:
    desk = ScriptedDesk()
    watched = roster(ScriptedCluster(), desk)
    desk.reports = [Report("rank", 1, "alpha", 7, "ready")]
    watched.read(0.0)
    watched.forget("rank 1")
    desk.reports = [
        Report("rank", 1, "alpha", 7, "failed", "too late"),
        Report("rank", 1, "alpha", 8, "ready"),
    ]
    watched.read(0.0)
    assert watched.ready() == {"rank 1"} and watched.reports["rank 1"].pid == 8
