"""The ends of clusters: closed, killed, refused. Every test has a cluster of its own."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from lockstep.launch.cluster.cluster import LaunchError, Task
from lockstep.launch.cluster.local import LocalCluster
from support.launch.clusters import dummy, make, next_deaths, until
from support.launch.launcher import command_of


@pytest.mark.parametrize("backend", ["local", pytest.param("ray", marks=pytest.mark.ray)])
def test_close_kills_even_what_ignores_sigterm(backend: str, tmp_path: Path) -> None:
    before = set(psutil.Process().children(recursive=True))
    made = make(backend, tmp_path)
    made.start([dummy(0, "ignore"), dummy(1, "sleep")])
    pids = [place.pid for _, place in made.running()]
    own = [" ".join(command_of(process)) for process in set(psutil.Process().children()) - before]
    assert any("/raylet" in command for command in own) == (backend == "ray")
    ended = "/ray/autoscaler/", "/ray/dashboard/dashboard.py", "/log_monitor.py"
    assert not [command for command in own if any(name in command for name in ended)]
    made.close()
    assert not any(psutil.pid_exists(pid) for pid in pids)
    until(
        lambda: set(psutil.Process().children(recursive=True)) <= before, "the cluster's own processes to end"
    )


def test_more_gpus_than_there_are_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1")
    cluster = LocalCluster(tmp_path)
    assert cluster.gpus_per_node == 1
    task = dummy(1, "sleep")
    with pytest.raises(LaunchError, match="rank 1 needs a GPU of its own, but 1 are visible"):
        cluster.start([Task(task.role, 1, task.spec, num_gpus=1)])


@pytest.mark.ray
def test_a_lost_ray_actor_is_a_death(tmp_path: Path) -> None:
    cluster = make("ray", tmp_path)
    try:
        cluster.start([dummy(0, "sleep")])
        [(_, place)] = cluster.running()
        actor = psutil.Process(place.pid).parent()
        assert actor is not None
        actor.kill()
        [death] = next_deaths(cluster, 1)
        assert (death.code, death.lost_with) == (None, f"the Ray actor on {place.host}")
        until(lambda: not psutil.pid_exists(place.pid), "the process to go with its actor")
    finally:
        cluster.close()


@pytest.mark.ray
def test_no_room_is_an_error_with_the_figures(tmp_path: Path) -> None:
    from lockstep.launch.cluster.ray_cluster import Needs, RayCluster

    no_room = (
        r"Ray found no room for 1 x 2 CPU, 2 GPU for the ranks in 1 s; the cluster has \S+ \(\S+\): 4 CPU;"
    )
    with pytest.raises(LaunchError, match=no_room):
        RayCluster(tmp_path, Needs(1, 2, gpus=True), address=None, deadline=1.0)


def test_several_nodes_need_a_cluster_to_join(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lockstep.launch.cluster.ray_cluster import Needs, RayCluster

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(LaunchError, match=r"cluster\.nodes = 2: needs a Ray cluster"):
        RayCluster(tmp_path, Needs(2, 1, gpus=False), address=None)


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("127.0.0.1:1", "Connection refused"),
        ("ray://127.0.0.1:1", "should be host:port"),
        ("head", "should be host:port"),
    ],
)
def test_an_unreachable_ray_cluster_is_an_error(address: str, why: str, tmp_path: Path) -> None:
    from lockstep.launch.cluster.ray_cluster import Needs, RayCluster

    with pytest.raises(LaunchError, match=f"the Ray cluster at {address} cannot be reached: .*{why}"):
        RayCluster(tmp_path, Needs(1, 1, gpus=False), address=address)
