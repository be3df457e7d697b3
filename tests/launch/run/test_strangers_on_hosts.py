"""Two hosts, and a third that belongs to neither: it reads, writes and joins nothing."""

from __future__ import annotations

import signal
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from support.launch.clusters import until
from support.launch.hosts import needs_hosts
from support.launch.launcher import Launcher
from support.launch.open_sockets import OpenSocket, sockets_of
from support.launch.two_hosts import RayHosts, ray_hosts

pytestmark = [*needs_hosts, pytest.mark.ray]

FIXED = ("--recipe", "demo-two-hosts", "frontend.port=8000", "kv_cache.memory=16MiB", "cluster.threads=1")
ASK: dict[str, Any] = {"model": "demo", "prompt": "Once", "max_tokens": 240, "temperature": 0.0}
OPENINGS = (b"", b"\xff" * 3000, b"\xff" + bytes(8) + b"\x7f\x03\x01NULL" + bytes(48), struct.pack("<q", 1))


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayHosts]:
    with ray_hosts("alpha", "beta", cpus=(3, 2)) as made:
        yield made


def launch(folder: Path, cluster: RayHosts, *arguments: str) -> Launcher:
    return Launcher(folder, *FIXED, *arguments, environment=cluster.environment, host=cluster.hosts[0])


def knock(cluster: RayHosts, doors: dict[str, list[OpenSocket]], held: ExitStack) -> None:
    """Connects to every port from this machine, on the same switch, and keeps the lines."""
    for host in cluster.hosts:
        for door in doors[host.name]:
            for words in OPENINGS:
                line = held.enter_context(socket.create_connection((host.address, door.port), timeout=30.0))
                line.sendall(words)


def test_a_third_host_changes_nothing(cluster: RayHosts, tmp_path: Path) -> None:
    alpha, beta = cluster.hosts
    url = f"http://{alpha.address}:8000/v1"
    with launch(tmp_path, cluster) as launcher, openai.OpenAI(base_url=url, api_key="none") as client:
        launcher.url(120.0)
        doors = {
            host.name: [door for door in sockets_of(host) if not door.on_loopback and door.kind == "tcp"]
            for host in cluster.hosts
        }
        for host in cluster.hosts:
            ours = [door for door in doors[host.name] if "lockstep.launch" in door.command]
            others = {"0.0.0.0", "::"} if host is alpha else set()  # the server, and Ray's driver
            assert {door.address for door in ours} == {host.address} | others, ours
            assert [door.port for door in ours if door.address == "0.0.0.0"] == [8000] * (host is alpha)
            assert len([door for door in ours if door.address == "::"]) == int(host is alpha), ours
        whole = client.completions.create(**ASK).choices[0].text
        with ExitStack() as held:
            chunks = client.completions.create(stream=True, **ASK)
            text = next(chunks).choices[0].text
            knock(cluster, doors, held)
            assert text + "".join(chunk.choices[0].text for chunk in chunks) == whole
            assert "in its place" not in launcher.err
            chunks = client.completions.create(stream=True, **ASK)
            text = next(chunks).choices[0].text
            psutil.Process(cluster.rank(beta, 1)).kill()
            assert text + "".join(chunk.choices[0].text for chunk in chunks) == whole
            until(lambda: "all ranks serve again" in launcher.err, "another rank", 60.0)
        launcher.signal(signal.SIGTERM)
        assert launcher.wait(60.0) == 0, launcher.err


def test_a_ray_that_anybody_may_join_is_refused(tmp_path: Path) -> None:
    with (
        ray_hosts("alpha", cpus=(4,), settings={"RAY_AUTH_MODE": "disabled"}) as without,
        launch(tmp_path, without, "cluster.nodes=1") as launcher,
    ):
        assert launcher.wait(60.0) == 1
        [line] = [line for line in launcher.err.splitlines() if line.startswith("error: ")]
        assert line.startswith(f"error: the Ray cluster at {without.address} asks for no token")


def test_a_joined_cluster_of_one_node_keeps_to_its_loopback(tmp_path: Path) -> None:
    settings = ("cluster.nodes=1", "cluster.ranks_per_node=2", "frontend.host=127.0.0.1")
    with ray_hosts("alpha", cpus=(4,)) as cluster, launch(tmp_path, cluster, *settings) as launcher:
        launcher.url(120.0)
        ours = [door for door in sockets_of(cluster.hosts[0]) if "cluster.entry" in door.command]
        assert len(ours) == 3 + 2 * 2, "the controller's; each rank's for steps and for moves"
        assert [door for door in ours if not door.on_loopback] == []
        launcher.signal(signal.SIGTERM)
        assert launcher.wait(60.0) == 0, launcher.err
