"""A Ray cluster on hosts made of namespaces: the head on the first, a node on each other."""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from .clusters import until
from .hosts import Host, make_hosts
from .launcher import command_of

RAY = str(Path(sys.executable).parent / "ray")
PORT = 6379


class RayHosts:
    """``up`` starts a node, ``lose`` ends it. ``environment``: settings of a joining process."""

    def __init__(self, hosts: list[Host], folder: Path, settings: Mapping[str, str]) -> None:
        self.hosts = hosts
        self.address = f"{hosts[0].address}:{PORT}"
        self._folder = folder
        self._started: list[subprocess.Popen[bytes]] = []
        self.environment = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ADDRESS": self.address,
            # Notice a lost node in about 3 s instead of 20.
            "RAY_health_check_period_ms": "500",
            "RAY_health_check_timeout_ms": "1000",
            "RAY_health_check_failure_threshold": "3",
        } | settings

    def surroundings(self) -> dict[str, str]:
        """The environment of a process that joins."""
        return os.environ | self.environment

    def up(self, host: Host, cpus: int) -> None:
        """Starts Ray on a host and waits for it."""
        head = host == self.hosts[0]
        role = ["--head", f"--port={PORT}", "--include-dashboard=false", f"--temp-dir={self._folder}"]
        options = [*(role if head else [f"--address={self.address}"]), "--block", f"--num-cpus={cpus}"]
        output = self._folder.parent / f"{host.name}.log"
        with output.open("wb") as log:
            process = host.popen(
                RAY,
                "start",
                *options,
                f"--node-ip-address={host.address}",
                "--object-store-memory=100000000",
                env={
                    name: value
                    for name, value in (os.environ | self.environment).items()
                    if name != "RAY_ADDRESS"
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._started.append(process)
        until(lambda: "Ray runtime started" in output.read_text(), f"Ray on {host.name}, see {output}", 60.0)

    def lose(self, host: Host) -> None:
        """Kills everything on a host at once; the host itself stays."""
        for process in host.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def end(self) -> None:
        for host in self.hosts:
            self.lose(host)
        for process in self._started:
            process.wait(20)

    def rank(self, host: Host, index: int) -> int:
        """The process id of a rank on a host, as this machine numbers it."""
        for process in host.processes():
            if command_of(process)[-3:-1] == ["rank", str(index)]:
                return process.pid
        raise AssertionError(
            f"no rank {index} on {host.name}: {[command_of(process)[:6] for process in host.processes()]}"
        )


@contextmanager
def ray_hosts(
    *names: str,
    cpus: tuple[int, ...],
    private: Sequence[Path] = (),
    shm: str = "1g",
    settings: Mapping[str, str] | None = None,
) -> Iterator[RayHosts]:
    """Hosts with Ray and ``cpus`` CPUs each; 0: no Ray on it. ``settings``: of Ray's environment.
    Other arguments as ``make_hosts``.
    """
    with ExitStack() as stack:
        folder = Path(
            stack.enter_context(TemporaryDirectory(prefix="rh-", dir="/tmp", ignore_cleanup_errors=True))
        )
        (folder / "ray").mkdir()
        hosts = stack.enter_context(make_hosts(*names, private=private, shm=shm))
        cluster = RayHosts(hosts, folder / "ray", settings or {})
        for host, number in zip(cluster.hosts, cpus, strict=True):
            if number:
                cluster.up(host, number)
        try:
            yield cluster
        finally:
            cluster.end()
