"""A process that fails reports it once, through its real entry point."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from lockstep.engine.protocol.cluster_state import Report
from lockstep.engine.protocol.sockets import new_keypair
from lockstep.engine.protocol.specs import (
    AcceptorSpec,
    ControllerSpec,
    FrontendSpec,
    Keys,
    LobbySpec,
    SchedulerSpec,
)
from lockstep.launch.run.lobby_desk import LobbyDesk
from lockstep.parallel.mesh import Mesh


def frontend(lobby: LobbySpec) -> FrontendSpec:
    return FrontendSpec(
        name="frontend-3",
        index=3,
        keys=lobby.keys,
        address="tcp://127.0.0.1:1",
        acceptor=AcceptorSpec(address="nobody", token="t"),
        model_path="/nowhere",
        served_name="m",
        vocab_size=8,
        lobby=lobby,
    )


def controller(lobby: LobbySpec) -> ControllerSpec:
    public, secret = new_keypair()
    return ControllerSpec(
        host="127.0.0.1",
        public=public,
        secret=secret,
        allowed=(),
        mesh=Mesh(),
        scheduler=SchedulerSpec(),
        model_max_len=8,
        max_len=None,
        rank_deadline=0.2,
        lobby=lobby,
    )


@pytest.mark.parametrize(
    ("role", "index", "make", "words"),
    [
        ("frontend", 3, frontend, "/nowhere"),
        ("controller", 0, controller, "ranks [0] have not reported within 0 s"),
    ],
)
def test_a_failing_process_reports_it_once(
    role: str, index: int, make: object, words: str, tmp_path: Path
) -> None:
    desk_keys, own = new_keypair(), new_keypair()
    desk = LobbyDesk("127.0.0.1", *desk_keys, allowed=(own[0],))
    lobby = LobbySpec(
        address=desk.address, keys=Keys(server_public=desk_keys[0], public=own[0], secret=own[1])
    )
    assert callable(make)
    command = [sys.executable, "-m", "lockstep.launch.cluster.entry", role, str(index), str(os.getpid())]
    ended = subprocess.run(
        command,
        input=msgspec.json.encode(make(lobby)),
        capture_output=True,
        timeout=60,
        check=False,
        cwd=tmp_path,
    )
    reports: list[Report] = []
    while found := desk.read(0.5):
        reports += found
    desk.close()
    assert ended.returncode == 1
    failures = [report for report in reports if report.phase == "failed"]
    assert len(failures) == 1 and words in failures[0].detail, ended.stderr.decode()
    assert (failures[0].role, failures[0].index, reports[-1].phase) == (role, index, "failed")
