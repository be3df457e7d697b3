"""The job of ``launch slurm`` in a real Slurm on two hosts: serves, drains, leaves nothing."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.launch.clusters import until
from support.launch.launcher import command_of
from support.launch.slurm_cluster import Job, SlurmCluster, needs_slurm, slurm_cluster
from support.serving.reader import Reader, client, refused

pytestmark = [*needs_slurm]


@pytest.fixture(scope="module")
def slurm() -> Iterator[SlurmCluster]:
    with slurm_cluster("one", "two") as cluster:
        yield cluster


def script(cluster: SlurmCluster, *arguments: str, recipe: str = "demo-two-hosts") -> str:
    """The output of ``launch slurm``, for shared nodes with their own folders in place of /tmp."""
    command = [
        str(Path(sys.executable).parent / "launch"),
        "slurm",
        "--recipe",
        recipe,
        "--cpus=4",
        f"--scratch={cluster.own}",
    ]
    threads = "cluster.threads=1"  # each host believes that it has all of the machine's cores
    return subprocess.run(
        [*command, *arguments, threads], capture_output=True, text=True, check=True, timeout=60
    ).stdout


def ended(job: Job, state: str, code: int) -> None:
    assert job.wait(90.0) == (state, code), job.output
    until(lambda: not job.cluster.left(), "nothing to be left on the nodes", 20.0)
    assert not (job.folder / "endpoint").exists()


def test_a_time_limit_drains_and_the_drain_has_its_deadline(slurm: SlurmCluster) -> None:
    """The first test of the file: Slurm checks limits 30 s after its own start, when the job will
    just serve, and then every 30 s.
    """
    job = slurm.submit(script(slurm, "--no-check", "--time=10", "cluster.drain_deadline=2"))
    url = job.url()
    streams = [Reader(url, 4000).flowing()]
    began = time.monotonic()
    slurm.command(
        "scontrol", "update", f"JobId={job.number}", "EndTime=now+80seconds"
    )  # the signal is due 62 s before it, or earlier

    def is_told() -> bool:
        if streams[-1].chunks > 2000:  # so that one of them always lasts longer than the drain may
            streams.append(Reader(url, 4000))
            streams[-1].start()
        return "told to stop" in job.output

    until(is_told, "Slurm to look at its limits, every 30 s", 60.0)
    told = time.monotonic() - began
    for stream in streams:
        stream.join(30)
        assert not stream.is_alive()
    assert [stream.finish for stream in streams if stream.chunks][-1] != "length"
    ended(job, "COMPLETED", 0)
    assert "drained; stopping" in job.output
    assert time.monotonic() - began < told + 30


def test_a_job_serves_from_two_hosts_and_scancel_drains_it(slurm: SlurmCluster) -> None:
    job = slurm.submit(script(slurm, "--time=10", "cluster.drain_deadline=40"))
    url = job.url()
    on = {
        host.name: [" ".join(command_of(process)[-3:-1]) for process in host.processes()]
        for host in slurm.hosts
    }
    assert [rank for name in ("one", "two") for rank in on[name] if rank.startswith("rank ")] == [
        "rank 0",
        "rank 1",
    ]
    assert [rank for rank in on["two"] if rank.startswith("rank ")]
    assert {path.name for path in job.folder.glob("lockstep-*/*.log")} == {
        "controller-0.log",
        "fork-server-one.log",
        "fork-server-two.log",
        "frontend-0.log",
        "rank-0.log",
        "rank-1.log",
    }
    assert (job.folder / "ray-one.log").exists() and (job.folder / "ray-two.log").exists()
    with client(url) as made:
        chat = made.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": "Hello"}], max_tokens=8
        )
        assert chat.usage is not None and chat.usage.completion_tokens >= 1
    stream = Reader(url, 100).flowing()
    slurm.command("scancel", str(job.number))
    until(lambda: refused(url), "new requests to be refused", 30.0)
    stream.join(45)
    assert (stream.error, stream.finish) == (None, "length")
    ended(job, "CANCELLED", 0)
    assert "drained; stopping" in job.output and f"job {job.number} ends with 0" in job.output


@pytest.mark.parametrize(("check", "words"), [(True, "nowhere: not a directory"), (False, "nowhere")])
def test_a_job_that_cannot_serve_ends_at_once_and_says_why(
    check: bool, words: str, slurm: SlurmCluster
) -> None:
    recipe = slurm.work / "broken.yaml"
    recipe.write_text("model: {path: nowhere}\ncluster: {device: cpu, nodes: 2}\n")
    job = slurm.submit(script(slurm, "--time=10", "--check" if check else "--no-check", recipe=str(recipe)))
    ended(job, "FAILED", 1)
    errors = [line for line in job.output.splitlines() if words in line]
    assert len(errors) == 1 + check, job.output  # launch check says it of each node
    assert "Traceback" not in job.output and "ready: " not in job.output
