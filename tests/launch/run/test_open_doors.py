"""The sockets of a run: all on the loopback, and strangers who reach them change nothing."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import stat
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from support.launch.clusters import until
from support.launch.launcher import Launcher, command_of
from support.launch.open_sockets import OpenSocket, open_sockets

FIXED = ("--recipe", "demo", "kv_cache.memory=16MiB", "cluster.threads=1")
ASK: dict[str, Any] = {
    "model": "demo",
    "prompt": "Once",
    "max_tokens": 400,
    "temperature": 0.0,
    "extra_body": {"ignore_eos": True},
}
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01CURVE" + bytes(47)  # ZeroMQ's
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"  # gRPC's
OPENINGS = (
    b"",
    bytes(64),
    b"\xff" * 5000,
    GREETING + b"\xff" * 500,
    PREFACE + b"\xff" * 500,
    struct.pack("<q", 1),
)


@pytest.fixture(scope="module", params=["local", pytest.param("ray", marks=pytest.mark.ray)])
def launcher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    """Two ranks behind a port on the loopback; a recording and a folder for logs of its own."""
    folder = tmp_path_factory.mktemp("doors")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    more = (f"cluster.backend={request.param}", f"frontend.port={port}", f"cluster.log_dir={folder / 'logs'}")
    with Launcher(folder, *FIXED, *more, f"recording={folder / 'recording'}") as started:
        assert started.url(240.0) == f"http://127.0.0.1:{port}/v1"
        yield started
        started.signal(signal.SIGTERM)
        assert started.wait(60.0) == 0, started.err
        started.assert_nothing_left()


def processes(launcher: Launcher) -> list[psutil.Process]:
    launcher.look()
    root = psutil.Process(launcher.process.pid)
    return [root, *root.children(recursive=True)]


def doors(launcher: Launcher) -> set[OpenSocket]:
    return open_sockets(processes(launcher))


def test_everything_listens_on_the_loopback(launcher: Launcher) -> None:
    found = doors(launcher)
    assert len(found) >= 7, "the server, the lobby, the store, three of the controller, one per rank"
    assert [door for door in found if not door.on_loopback] == []
    assert [door for door in found if door.kind == "udp"] == []


def test_secrets_are_on_no_command_line_and_in_no_file_of_others(launcher: Launcher, tmp_path: Path) -> None:
    running = processes(launcher)
    environments = [process.environ() for process in running if process.is_running()]
    tokens = {
        environment["RAY_AUTH_TOKEN"] for environment in environments if "RAY_AUTH_TOKEN" in environment
    }
    told = " ".join(" ".join(command_of(process)) for process in running) + launcher.out + launcher.err
    assert not [token for token in tokens if token in told]
    for rank in range(2):  # no secret of the run and of Ray goes where a rank's children would inherit it
        assert "RAY_AUTH_TOKEN" not in psutil.Process(launcher.pid_of(f"rank {rank}")).environ()
    folder = Path(launcher.process.args[-1].partition("=")[2]).parent  # type: ignore[union-attr, index]
    [logs] = (folder / "logs").iterdir()
    assert stat.S_IMODE(logs.stat().st_mode) == 0o700
    files = [folder / "recording", *logs.glob("*.log")]
    assert len(files) >= 5
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    texts = [path.read_bytes() for path in logs.rglob("*") if path.is_file()]
    assert not [token for token in tokens if any(token.encode() in text for text in texts)]


@pytest.mark.parametrize("launcher", [pytest.param("ray", marks=pytest.mark.ray)], indirect=True)
def test_garbage_and_silence_at_every_door_change_no_stream(launcher: Launcher) -> None:
    door = launcher.url()
    with openai.OpenAI(base_url=door, api_key="none", max_retries=0, timeout=120.0) as client:
        whole = client.completions.create(**ASK).choices[0].text
        ranks = [launcher.pid_of(f"rank {rank}") for rank in range(2)]
        epoch = httpx.get(door.removesuffix("/v1") + "/metrics", timeout=30.0).text
        with ExitStack() as held, client.completions.create(stream=True, **ASK) as chunks:
            text = next(chunks).choices[0].text
            for each in sorted(doors(launcher), key=lambda each: each.port):
                family = "::1" if each.address == "::1" else "127.0.0.1"
                for words in (*OPENINGS, secrets.token_bytes(3000)):
                    line = held.enter_context(socket.create_connection((family, each.port), timeout=30.0))
                    line.sendall(words)
            text += "".join(chunk.choices[0].text for chunk in chunks)
            assert text == whole
            assert client.completions.create(**ASK).choices[0].text == whole, "with all of them still there"
        assert ranks == [launcher.pid_of(f"rank {rank}") for rank in range(2)]
        now = httpx.get(door.removesuffix("/v1") + "/metrics", timeout=30.0).text
        number = next(line for line in epoch.splitlines() if line.startswith("lockstep:epoch"))
        assert number in now.splitlines(), "no epoch was lost to it"


@pytest.mark.parametrize("launcher", ["local"], indirect=True)
def test_a_rank_is_replaced_while_strangers_hang_at_every_door(launcher: Launcher) -> None:
    with openai.OpenAI(base_url=launcher.url(), api_key="none", max_retries=0, timeout=120.0) as client:
        whole = client.completions.create(**ASK).choices[0].text
        with ExitStack() as held:
            for each in doors(launcher):
                for words in OPENINGS:
                    line = held.enter_context(
                        socket.create_connection(("127.0.0.1", each.port), timeout=30.0)
                    )
                    line.sendall(words)
            chunks = client.completions.create(stream=True, **ASK)
            text = next(chunks).choices[0].text
            os.kill(launcher.pid_of("rank 1"), signal.SIGKILL)
            text += "".join(chunk.choices[0].text for chunk in chunks)
            assert text == whole
            until(lambda: "all ranks serve again" in launcher.err, "the rank to be replaced", 90.0)
