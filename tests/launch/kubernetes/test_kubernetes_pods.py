"""The commands of the pods, run as processes on hosts with the pods' environment."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import pytest
import yaml
from typer.testing import CliRunner

from lockstep.launch.commands.main import app
from lockstep.launch.kubernetes.worker import outlast, wait
from support.launch.clusters import until
from support.launch.hosts import Host, inner, make_hosts, needs_hosts

BIN = Path(sys.executable).parent


class Pod:
    """A pod's container as a process on a host."""

    def __init__(self, host: Host, container: dict[str, Any], given: dict[str, str], folder: Path) -> None:
        self.host = host
        self._command, self._leave = (
            container["command"],
            container["lifecycle"]["preStop"]["exec"]["command"],
        )
        own = {entry["name"]: entry["value"] for entry in container["env"] if "value" in entry}
        own = {name: value for name, value in own.items() if not name.endswith("_CACHE_DIR")}  # volumes
        referred = {entry["name"] for entry in container["env"] if "valueFrom" in entry}
        assert referred <= given.keys() | {"POD_IP"}
        self.environment = os.environ | own | given | {"POD_IP": host.address}
        self.environment["PATH"] = f"{BIN}:{os.environ['PATH']}"
        self.log = folder / f"{host.name}.log"

    def start(self, command: list[str] | None = None) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return self.host.popen(
                *(command or self._command),
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def leave(self) -> subprocess.Popen[bytes]:
        """Runs the preStop hook."""
        return self.start(self._leave)


@pytest.fixture
def pods(tmp_path: Path) -> Iterator[dict[str, Pod]]:
    """Leader and worker of the demo on two hosts."""
    arguments = ["kv_cache.memory=16MiB", "cluster.threads=1", f"cluster.log_dir={tmp_path}"]
    arguments += ["cluster.drain_deadline=100"]
    printed = CliRunner().invoke(app, ["k8s", "--recipe", "demo-two-hosts", *arguments]).stdout
    group = next(item for item in yaml.safe_load_all(printed) if item["kind"] == "LeaderWorkerSet")
    templates = group["spec"]["leaderWorkerTemplate"]
    with (
        TemporaryDirectory(prefix="k8-", dir="/tmp", ignore_cleanup_errors=True) as temporary,
        make_hosts("leader", "worker", shm="1g") as hosts,
    ):
        given = {
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_TMPDIR": temporary,
            "LWS_LEADER_ADDRESS": "leader",
        }
        made = {}
        for host in hosts:
            [container] = templates[f"{host.name}Template"]["spec"]["containers"]
            made[host.name] = Pod(host, container, given, tmp_path)
        yield made


@pytest.mark.ray
@needs_hosts[0]
@needs_hosts[1]
def test_the_pods_of_a_group_serve_and_leave_in_order(pods: dict[str, Pod]) -> None:
    """All are started at once, as LeaderWorkerSet does, and told to end at once."""
    running = {name: pods[name].start() for name in ("worker", "leader")}
    leader, worker = pods["leader"], pods["worker"]
    url = f"http://{leader.host.address}:8000"

    def ready() -> bool:
        for name, process in running.items():
            assert process.poll() is None, f"{name} ended: {pods[name].log.read_text()[-2000:]}"
        try:
            return httpx.get(f"{url}/ready", timeout=5.0).status_code == 200
        except httpx.TransportError:
            return False

    until(ready, f"the group's /ready, see {leader.log}", 480.0)
    assert httpx.get(f"{url}/health", timeout=5.0).status_code == 200
    ask = {"prompt": "The planner", "max_tokens": 400, "ignore_eos": True}
    answers: list[httpx.Response] = []
    asking = threading.Thread(
        target=lambda: answers.append(httpx.post(f"{url}/v1/completions", json=ask, timeout=120.0))
    )
    leaving = worker.leave()
    assert leaving.wait(60) == 0, "a worker whose leader goes on serving leaves at once"
    asking.start()
    until(lambda: httpx.get(f"{url}/load", timeout=5.0).json()["num_running"] > 0, "a running request", 30.0)
    leaving = worker.leave()
    time.sleep(2.0)  # less than the leader's own hook takes
    inner(running["leader"]).terminate()
    asking.join(120)
    assert answers and answers[0].status_code == 200, "the running request is answered"
    assert running["leader"].wait(60) == 0, leader.log.read_text()[-2000:]
    assert leaving.wait(60) == 0
    inner(running["worker"]).terminate()
    running["worker"].wait(60)


# --------------------------------------------------------------------------- the worker's steps


class Ready(BaseHTTPRequestHandler):
    """Answers /ready with the server's ``status``."""

    def do_GET(self) -> None:
        assert self.path == "/ready"
        self.send_response(self.server.status)  # type: ignore[attr-defined]
        self.end_headers()

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[HTTPServer]:
    made = HTTPServer(("127.0.0.1", 0), Ready)
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


@pytest.mark.parametrize("status", [200, 404])
def test_a_worker_leaves_at_once_while_its_leader_serves(server: HTTPServer, status: int) -> None:
    server.status = status  # type: ignore[attr-defined]
    began = time.monotonic()
    assert outlast("127.0.0.1", server.server_port, 60.0, delay=0.0) == 0
    assert time.monotonic() - began < 30


def test_a_worker_outlives_a_leader_that_drains(server: HTTPServer) -> None:
    server.status = 503  # type: ignore[attr-defined]
    done = threading.Event()

    def leave() -> None:
        outlast("127.0.0.1", server.server_port, 60.0, delay=0.0)
        done.set()

    threading.Thread(target=leave, daemon=True).start()
    assert not done.wait(1.5)
    server.status = 200  # type: ignore[attr-defined]
    assert done.wait(30)


def test_a_leader_that_never_ends_is_outlived_for_the_grace_only(server: HTTPServer) -> None:
    server.status = 503  # type: ignore[attr-defined]
    assert outlast("127.0.0.1", server.server_port, 0.5, delay=0.0) == 0


def test_a_worker_waits_for_its_leader_and_says_whom_it_waited_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        assert wait("127.0.0.1", port, 0.2) == 1
        assert f"127.0.0.1:{port}" in capsys.readouterr().err
        threading.Timer(0.6, listener.listen).start()
        assert wait("127.0.0.1", port, 30.0) == 0
