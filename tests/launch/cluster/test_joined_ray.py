"""A running Ray cluster: joined, used, and left as it was."""

from __future__ import annotations

import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from support.launch.clusters import until
from support.launch.launcher import Launcher, alive, command_of

pytestmark = [pytest.mark.ray]


class Head:
    """The head node of a cluster with four CPUs and a token of its own."""

    def __init__(self, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = int(free.getsockname()[1])
        self.environment = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        options = [
            "--head",
            "--block",
            "--num-cpus=4",
            "--object-store-memory=100000000",
            "--include-dashboard=false",
        ]
        self.process = psutil.Popen(
            [
                str(Path(sys.executable).parent / "ray"),
                "start",
                *options,
                "--node-ip-address=127.0.0.1",
                f"--port={self.port}",
                f"--temp-dir={folder}",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=psutil.Process().environ() | self.environment,
            start_new_session=True,
        )

    def listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def processes(self) -> list[psutil.Process]:
        return [process for process in self.process.children(recursive=True) if alive(process)]

    def roles(self) -> list[str]:
        """Our processes below the head node."""
        commands = [command_of(process) for process in self.processes()]
        return [" ".join(command[-3:-1]) for command in commands if "support.launch.dummy_cluster" in command]

    def end(self) -> None:
        below = self.processes()
        self.process.terminate()
        for process in psutil.wait_procs([self.process, *below], timeout=5)[1]:
            process.kill()


@pytest.fixture
def head() -> Iterator[Head]:
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    started = Head(folder)
    try:
        until(started.listens, "the head node", 60.0)
        yield started
    finally:
        started.end()
        shutil.rmtree(folder, ignore_errors=True)


def launch(folder: Path, head: Head, *arguments: str, **environment: str) -> Launcher:
    fixed = ("--recipe", "demo", "frontend.port=0", *arguments)
    return Launcher(
        folder,
        *fixed,
        module="support.launch.launch_dummies",
        environment={**head.environment, **environment},
    )


def test_a_running_cluster_is_joined_and_left_as_it_was(head: Head, tmp_path: Path) -> None:
    with launch(tmp_path / "a", head, f"cluster.address=127.0.0.1:{head.port}") as launcher:
        launcher.url()
        assert sorted(head.roles()) == ["rank 0", "rank 1"]
        assert launcher.pid_of("controller 0") and launcher.pid_of("frontend 0"), "beside the launcher"
        launcher.signal()
        assert launcher.wait() == 0, launcher.err
    until(lambda: not head.roles(), "the roles to end")
    assert head.listens()
    with launch(tmp_path / "b", head, RAY_ADDRESS=f"127.0.0.1:{head.port}") as launcher:
        launcher.url()
        assert len(head.roles()) == 2
        launcher.process.kill()
        launcher.wait()
        until(lambda: not head.roles(), "the roles to end with their driver", 20.0)
    assert head.listens()
