"""The demo on two hosts: placement, the official client, a lost process and a lost host."""

from __future__ import annotations

import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from lockstep.launch.recipe.file import find_recipe
from lockstep.launch.run.quarantine import DEATHS
from support.launch.clusters import until
from support.launch.hosts import Host, needs_hosts
from support.launch.launch_dummies import HASTE
from support.launch.launcher import Launcher, command_of
from support.launch.two_hosts import RayHosts, ray_hosts

pytestmark = [*needs_hosts, pytest.mark.ray]

DEMO = find_recipe("demo").parent / "demo" / "model"
TOKENS = 240
PROMPT = "The planner sends the next step to every rank"
GREEDY: dict[str, Any] = {"model": "demo", "temperature": 0.0, "extra_body": {"ignore_eos": True}}
FIXED = ("--recipe", "demo-two-hosts", "frontend.port=8000", "kv_cache.memory=16MiB", "cluster.threads=1")


def launch(folder: Path, cluster: RayHosts, *arguments: str, module: str = "lockstep.launch.cli") -> Launcher:
    """The launch command on the first host."""
    return Launcher(
        folder, *FIXED, *arguments, module=module, environment=cluster.environment, host=cluster.hosts[0]
    )


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that every host has for itself."""
    return tmp_path_factory.mktemp("private")


@pytest.fixture(scope="module")
def cluster(private: Path) -> Iterator[RayHosts]:
    """The first host has room for a rank beside the controller and the frontend."""
    with ray_hosts("alpha", "beta", cpus=(3, 2), private=[private]) as made:
        yield made


def client(cluster: RayHosts) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"http://{cluster.hosts[0].address}:8000/v1", api_key="none", max_retries=0, timeout=150.0
    )


def completion(client: openai.OpenAI, max_tokens: int) -> str:
    return client.completions.create(prompt=PROMPT, max_tokens=max_tokens, **GREEDY).choices[0].text


def health(cluster: RayHosts) -> httpx.Response:
    return httpx.get(f"http://{cluster.hosts[0].address}:8000/health", timeout=10.0)


class Stream(threading.Thread):
    """A stream that is read while something happens to the cluster."""

    def __init__(self, client: openai.OpenAI, max_tokens: int) -> None:
        super().__init__(daemon=True)
        self.text, self.error = "", ""
        self._chunks = client.completions.create(prompt=PROMPT, max_tokens=max_tokens, stream=True, **GREEDY)
        self.start()

    def run(self) -> None:
        try:
            for chunk in self._chunks:
                self.text += chunk.choices[0].text
        except openai.OpenAIError as error:
            self.error = str(error)

    def rest(self, seconds: float) -> str:
        self.join(seconds)
        assert not self.is_alive(), f"the stream has not ended in {seconds:g} s"
        assert not self.error
        return self.text


def test_ranks_are_on_both_hosts_and_a_killed_one_and_a_lost_host_are_survived(
    cluster: RayHosts, tmp_path: Path
) -> None:
    alpha, beta = cluster.hosts
    with launch(tmp_path, cluster, "cluster.start_deadline=60") as launcher, client(cluster) as asked:
        launcher.url(120.0)
        assert cluster.rank(alpha, 0) and cluster.rank(beta, 1)
        load = r"(compile [\d.]+, )?load [\d.]+ \(slowest: rank \d on (alpha|beta)\)"
        phases = rf"Ray [\d.]+, placement [\d.]+, controller [\d.]+, {load}, frontend [\d.]+, first token"
        assert re.search(rf"\({phases} [\d.]+\)", launcher.out), launcher.out
        environment = psutil.Process(cluster.rank(beta, 1)).environ()
        assert (environment["GLOO_SOCKET_IFNAME"], environment["NCCL_SOCKET_IFNAME"]) == ("eth0", "eth0")
        whole = completion(asked, TOKENS)

        stream = Stream(asked, TOKENS)
        until(lambda: len(stream.text) > 20, "the stream to begin")
        psutil.Process(cluster.rank(beta, 1)).kill()
        assert stream.rest(150.0) == whole
        killed = re.compile(
            r"rank 1 on beta \(pid \d+\) was killed by SIGKILL .*; starting another in its place"
        )
        until(lambda: bool(killed.search(launcher.err)), "the death to be told", 30.0)
        until(lambda: "all ranks serve again" in launcher.err, "another in its place", 120.0)

        stream = Stream(asked, TOKENS)
        until(lambda: len(stream.text) > 20, "the stream to begin")
        cluster.lose(beta)
        lost = f"the node beta ({beta.address}) was lost, and with it rank 1; "
        lost += "starting another in its place, requests wait"
        until(lambda: lost in launcher.err, "the loss to be told", 30.0)
        until(
            lambda: "no node has room for rank 1 (1 CPU a node); the cluster has alpha" in launcher.err,
            "the want of room",
            30.0,
        )
        until(lambda: health(cluster).status_code == 503, "the frontend to hear of it", 30.0)
        assert lost.partition(";")[0] in health(cluster).text
        cluster.up(beta, 2)
        assert stream.rest(150.0) == whole
        until(lambda: "a node with room has been found" in launcher.err, "the room to be told", 30.0)
        assert cluster.rank(beta, 1)
        assert completion(asked, TOKENS) == whole
        assert "raylet" not in launcher.out + launcher.err
        launcher.signal(signal.SIGTERM)
        assert launcher.wait(120.0) == 0, launcher.err
    for host in cluster.hosts:
        assert not [
            process for process in host.processes() if "lockstep.launch.cluster.entry" in command_of(process)
        ]


def test_the_rest_serves_for_as_long_as_a_lost_host_has_no_successor(
    cluster: RayHosts, tmp_path: Path
) -> None:
    _, beta = cluster.hosts
    deadline, hasty = 60.0, "support.launch.launch_hasty"
    overrides = "experts.redundant=32", f"cluster.start_deadline={deadline:g}"
    with launch(tmp_path, cluster, *overrides, module=hasty) as launcher, client(cluster) as asked:
        launcher.url(120.0)
        whole = completion(asked, TOKENS)
        stream = Stream(asked, TOKENS)
        until(lambda: len(stream.text) > 20, "the stream to begin")
        cluster.lose(beta)
        lost = time.monotonic()
        assert stream.rest(150.0) == whole, "rank 0 has a replica of every expert"
        until(lambda: "the others serve after" in launcher.err, "the loss to be over", 30.0)
        until(lambda: "no node has room for rank 1" in launcher.err, "the want of room", 30.0)
        health_now = health(cluster)
        assert health_now.status_code == 200 and "rank 1 on beta lost" in health_now.json()["degraded"]
        until(lambda: time.monotonic() > lost + deadline / HASTE + 2.0, "the deadline of a start to pass")
        assert completion(asked, TOKENS) == whole
        cluster.up(beta, 2)
        until(lambda: "all ranks serve again, in epoch" in launcher.err, "rank 1 to join", 120.0)
        assert cluster.rank(beta, 1) and completion(asked, TOKENS) == whole
        launcher.signal(signal.SIGTERM)
        assert launcher.wait(120.0) == 0, launcher.err


def test_a_rank_that_fails_on_another_host_is_one_message(
    cluster: RayHosts, private: Path, tmp_path: Path
) -> None:
    for host in cluster.hosts:
        host.run("cp", "-r", str(DEMO), str(private))
    shard = private / "model" / "model-00002-of-00002.safetensors"
    cluster.hosts[1].run("truncate", "-s", "-100", str(shard))
    with launch(tmp_path, cluster, f"model.path={private / 'model'}") as launcher:
        assert launcher.wait(120.0) == 1
        [line] = re.findall("^error: .*", launcher.err, re.MULTILINE)
        assert re.match(rf"error: rank 1 on beta \(pid \d+\) failed: {shard}: truncated", line)
        assert "Traceback" not in launcher.out + launcher.err


def test_a_lost_host_that_does_not_come_back_is_one_message_with_what_there_is(
    cluster: RayHosts, tmp_path: Path
) -> None:
    beta = cluster.hosts[1]
    with launch(
        tmp_path, cluster, f"cluster.start_deadline={4 * HASTE}", module="support.launch.launch_dummies"
    ) as launcher:
        launcher.url(120.0)
        cluster.lose(beta)
        assert launcher.wait(120.0) == 1
        [line] = re.findall("^error: .*", launcher.err, re.MULTILINE)
        lost = f"error: the node beta ({beta.address}) was lost, and with it rank 1; "
        assert line.startswith(
            f"{lost}the cluster does not serve again after 4 s: no node has room for rank 1 (1 CPU a node)"
        )
        assert "the cluster has alpha" in line


def test_ranks_leave_a_host_where_they_keep_dying_and_one_that_is_lost(tmp_path: Path) -> None:
    with ray_hosts("alpha", "beta", "gamma", cpus=(4, 1, 1)) as cluster:
        alpha, *others = cluster.hosts
        with launch(tmp_path, cluster) as launcher, client(cluster) as asked:
            launcher.url(120.0)
            whole = completion(asked, TOKENS)
            [first] = [host for host in others if any_rank(host)]
            [second] = [host for host in others if host != first]
            for time_of_death in range(1, DEATHS + 1):
                until(lambda: any_rank(first), "a rank on the first host", 120.0)
                stream = Stream(asked, TOKENS)
                until(lambda stream=stream: len(stream.text) > 20, "the stream to begin")
                psutil.Process(cluster.rank(first, 1)).kill()
                again = f"all ranks serve again after [^\n]* in epoch {time_of_death}"
                until(lambda again=again: bool(re.search(again, launcher.err)), "another in its place", 120.0)
                assert stream.rest(150.0) == whole
            moves = f"ranks died {DEATHS} times there within 600 s; its ranks move to {second.name} "
            assert f"{first.name}: {moves}({second.address})" in launcher.err
            assert cluster.rank(second, 1) and not any_rank(first)

            stream = Stream(asked, TOKENS)
            until(lambda: len(stream.text) > 20, "the stream to begin")
            second.down()  # at once and without a word, as when the power fails
            assert stream.rest(150.0) == whole
            assert cluster.rank(alpha, 1) and not any_rank(first)
            until(
                lambda: (
                    f"the node {second.name} ({second.address}) was lost, and with it rank 1" in launcher.err
                ),
                "the loss to be told",
                30.0,
            )
            launcher.signal(signal.SIGTERM)
            assert launcher.wait(120.0) == 0, launcher.err


def any_rank(host: Host) -> bool:
    return any(command_of(process)[-3:-2] == ["rank"] for process in host.processes())
