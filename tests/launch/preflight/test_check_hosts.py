"""``launch check`` on a real Ray cluster of two hosts: healthy, then with faults on the second."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from lockstep.launch.recipe.file import find_recipe
from support.launch.hosts import Host, make_hosts, needs_hosts
from support.launch.two_hosts import RayHosts, ray_hosts

pytestmark = [*needs_hosts, pytest.mark.ray]
DEMO = find_recipe("demo").parent / "demo" / "model"
LAUNCH = (str(Path(sys.executable).parent / "launch"),)
SOON = (
    "from lockstep.launch import cli; from lockstep.launch.preflight import check; "
    "check.ROOM_SECONDS = 4.0; cli.main()"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that every host has for itself; a test copies the checkpoint there."""
    return tmp_path_factory.mktemp("private")


@pytest.fixture(scope="module")
def cluster(model: Path) -> Iterator[RayHosts]:
    with ray_hosts("alpha", "beta", cpus=(4, 1), private=[model], shm="300m") as made:
        for host in made.hosts:
            host.run("cp", "-r", str(DEMO), str(model))
        yield made


def check(cluster: RayHosts, *arguments: str) -> tuple[int, list[dict[str, Any]]]:
    return check_on(cluster.hosts[0], cluster.surroundings(), "--recipe", "demo-two-hosts", *arguments)


def check_on(
    host: Host, environment: dict[str, str], *arguments: str, launch: Sequence[str] = LAUNCH
) -> tuple[int, list[dict[str, Any]]]:
    """Exit status and findings."""
    command = host.command(*launch, "check", "--json", *arguments)
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False, env=environment)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)["findings"]


def errors(found: list[dict[str, Any]]) -> list[str]:
    return [
        f"{line['subject']}: {line['where']}: {line['text']}" for line in found if line["level"] == "error"
    ]


def test_two_equal_hosts_are_fine_and_reach_each_other(cluster: RayHosts, model: Path) -> None:
    alpha, beta = (f"{host.name} ({host.address})" for host in cluster.hosts)
    code, found = check(cluster, f"model.path={model / 'model'}")
    assert (code, errors(found)) == (0, [])
    lines = {line["subject"]: line["text"] for line in found}
    assert lines["Ray"] == f"room for the ranks on {alpha}, {beta}; launched from {alpha}"
    assert lines["network"].startswith("2 of 2 directions work, round trip 0.")
    assert "GB/s through one TCP stream" in lines["network"]
    assert lines["clock"].endswith("s apart")
    assert {line["where"] for line in found if line["subject"] == "shared memory"} == {alpha, beta}


def test_faults_of_the_second_host_are_told_with_its_name(cluster: RayHosts, model: Path) -> None:
    beta = cluster.hosts[1]
    where = f"{beta.name} ({beta.address})"
    path = model / "model"
    shard = path / "model-00002-of-00002.safetensors"
    beta.run("truncate", "-s", "-100", str(shard))
    code, found = check(cluster, f"model.path={path}")
    assert code == 1
    [line] = errors(found)
    assert line.startswith(f"model: {where}: {shard}: truncated")
    beta.run("cp", str(DEMO / shard.name), str(shard))
    beta.run("sh", "-c", f"echo ' ' >> {path}/config.json")
    code, found = check(cluster, f"model.path={path}")
    assert code == 1
    assert len(errors(found)) == 1
    assert "config.json is not the same on" in errors(found)[0]
    beta.run("cp", str(DEMO / "config.json"), str(path))


def test_no_room_is_told_with_what_there_is(cluster: RayHosts) -> None:
    surroundings, soon = cluster.surroundings(), (sys.executable, "-c", SOON)
    code, found = check_on(
        cluster.hosts[0], surroundings, "--recipe", "demo-two-hosts", "cluster.nodes=3", launch=soon
    )
    assert code == 1
    [line] = errors(found)
    assert "found no room for 3 x 1 CPU for the ranks on 3 nodes, only on 2 in 4 s" in line
    assert "alpha" in line and "beta" in line


def test_a_small_dev_shm_is_a_warning_where_ray_is_started() -> None:
    with make_hosts("solo", shm="8m") as (solo,):
        code, found = check_on(solo, dict(os.environ), "--recipe", "demo")
        [line] = [line for line in found if line["level"] != "ok"]
        assert (code, line["level"], line["subject"]) == (3, "warning", "shared memory")
        assert line["where"] == "solo (127.0.0.1)"
        assert line["text"].endswith("free in /dev/shm; Ray uses a disk instead below 100.0 MiB")
