"""Both clusters of processes, with dummy roles: start, death, kill, and nothing left behind."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from lockstep.launch.cluster.cluster import Cluster
from support.launch.clusters import dummy, make, next_deaths


@pytest.fixture(scope="module", params=["local", pytest.param("ray", marks=pytest.mark.ray)])
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = make(request.param, tmp_path_factory.mktemp("run"))
    yield made
    made.close()


def test_a_process_runs_in_its_own_session(cluster: Cluster) -> None:
    task = dummy(0, "sleep")
    cluster.start([task])
    [(running, place)] = cluster.running()
    assert running == task
    assert os.getsid(place.pid) == place.pid != os.getsid(0)
    cluster.signal(task, signal.SIGKILL)
    next_deaths(cluster, 1)


def test_an_exit_is_reported_with_its_status_and_last_lines(cluster: Cluster) -> None:
    cluster.start([dummy(0, "exit", code=3, say="out of cheese"), dummy(1, "fail", say="the reason")])
    deaths = {death.task.index: death for death in next_deaths(cluster, 2)}
    assert deaths[0].code == 3
    assert "out of cheese" in deaths[0].tail
    assert deaths[0].cause == "exited with status 3"
    assert deaths[1].code == 1
    assert deaths[1].last_line == "RuntimeError: the reason"
    assert cluster.running() == []


def test_a_kill_is_reported_with_its_signal(cluster: Cluster) -> None:
    cluster.start([dummy(0, "sleep"), dummy(1, "sleep")])
    victim = next(place.pid for task, place in cluster.running() if task.index == 1)
    os.kill(victim, signal.SIGKILL)
    [death] = next_deaths(cluster, 1)
    assert (death.task.index, death.code) == (1, -signal.SIGKILL)
    assert "SIGKILL" in death.cause
    assert [task.index for task, _ in cluster.running()] == [0]
    cluster.signal(cluster.running()[0][0], signal.SIGTERM)
    [death] = next_deaths(cluster, 1)
    assert death.code == -signal.SIGTERM


def test_a_name_can_be_started_again_after_its_death(cluster: Cluster) -> None:
    for code in (4, 5):
        cluster.start([dummy(0, "exit", code=code)])
        assert next_deaths(cluster, 1)[0].code == code


def test_signals_to_the_dead_are_harmless(cluster: Cluster) -> None:
    task = dummy(0, "exit", code=0)
    cluster.start([task])
    time.sleep(1.0)
    cluster.signal(task, signal.SIGKILL)
    next_deaths(cluster, 1)
    cluster.signal(task, signal.SIGKILL)


def test_tasks_beside_the_launcher_run_too(cluster: Cluster) -> None:
    task = dummy(0, "sleep", role="controller")
    cluster.start([task])
    assert cluster.running()[0][1].pid > 0
    cluster.signal(task, signal.SIGKILL)
    next_deaths(cluster, 1)
