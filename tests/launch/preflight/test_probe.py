"""The real answers of this node about itself."""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from lockstep import __version__
from lockstep.launch.cluster.network import interface_of
from lockstep.launch.preflight.model_files import read_model_files
from lockstep.launch.preflight.probe import Questions, ask, look_around
from lockstep.launch.preflight.reach import Listener, Peer, call
from lockstep.launch.recipe.file import find_recipe

DEMO = find_recipe("demo").parent / "demo" / "model"
TOKEN = b"sixteen byte key"


def test_this_node_answers_everything_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys, msgspec; from lockstep.launch.preflight.probe import *;"
        f"facts = look_around(Questions({str(DEMO)!r}, ({str(tmp_path)!r},), thorough=False), '127.0.0.1');"
        "assert 'torch' not in sys.modules; print(msgspec.json.encode(facts).decode())"
    )
    facts = json.loads(
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
        ).stdout
    )
    assert facts["failed"] == {}
    assert facts["name"] == socket.gethostname()
    assert facts["versions"]["lockstep"] == __version__
    assert facts["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["interface"] == "lo"
    assert facts["memory"] > 1 << 27
    assert facts["shm"] > 0
    assert facts["numa"] >= 0
    assert facts["model"]["num_tensors"] == len(
        json.loads((DEMO / "model.safetensors.index.json").read_text())["weight_map"]
    )
    assert facts["limits"]["open_files"] in (-1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    [disk] = facts["disks"]
    assert (disk["path"], disk["problem"]) == (str(tmp_path), "")


def test_thorough_answers_are_those_of_torch_and_of_nvidia_smi(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho NVIDIA H100 80GB HBM3, 81559, 81076, 570.86.15\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    facts = look_around(Questions(str(DEMO)))
    assert facts.failed == {}
    assert facts.versions is not None
    assert facts.versions["torch"] == torch.__version__
    assert ("cuda" in facts.versions) == (torch.version.cuda is not None)
    assert facts.gpus is not None
    assert [(gpu.name, gpu.memory >> 20, gpu.driver) for gpu in facts.gpus] == [
        ("NVIDIA H100 80GB HBM3", 81559, "570.86.15")
    ]
    smi.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'; exit 9\n")
    assert "nvidia-smi: NVIDIA-SMI has failed" in look_around(Questions(str(DEMO))).failed["gpus"]


def test_a_question_without_an_answer_does_not_hold_up_the_others() -> None:
    never = threading.Event()

    def broken() -> object:
        raise OSError("no such thing")

    answers, failed = ask(
        {"slow": never.wait, "quick": lambda: 3, "broken": broken},
        {"slow": 0.2, "quick": 60.0, "broken": 60.0},
    )
    assert answers == {"quick": 3}
    assert failed == {"slow": "no answer within 0.2 s", "broken": "OSError: no such thing"}
    never.set()


def test_adapters_and_numa_nodes_are_read_from_sys(tmp_path: Path) -> None:
    for device, state, rate in (
        ("mlx5_0", "4: ACTIVE", "400 Gb/sec (4X NDR)"),
        ("mlx5_1", "1: DOWN", "10 Gb/sec (4X SDR)"),
    ):
        port = tmp_path / "sys/class/infiniband" / device / "ports/1"
        port.mkdir(parents=True)
        (port / "state").write_text(f"{state}\n")
        (port / "rate").write_text(f"{rate}\n")
    for node in (0, 1):
        (tmp_path / f"sys/devices/system/node/node{node}").mkdir(parents=True)
    facts = look_around(Questions(str(DEMO), thorough=False, root=str(tmp_path)))
    assert facts.rdma is not None
    assert [(port.name, port.state, port.rate) for port in facts.rdma] == [
        ("mlx5_0:1", "ACTIVE", "400 Gb/sec (4X NDR)"),
        ("mlx5_1:1", "DOWN", "10 Gb/sec (4X SDR)"),
    ]
    assert facts.numa == 2
    assert "meminfo" in facts.failed["memory"]


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    facts = look_around(
        Questions(
            str(DEMO), (str(tmp_path / "new" / "logs"), str(tmp_path / "file" / "logs")), thorough=False
        )
    )
    assert facts.disks is not None
    assert [disk.problem for disk in facts.disks] == [
        "",
        f"{tmp_path / 'file'}: not a writable folder",
    ]


def test_model_files_are_compared_by_header_and_size(tmp_path: Path) -> None:
    shutil.copytree(DEMO, tmp_path / "same")
    assert read_model_files(tmp_path / "same").parts == read_model_files(DEMO).parts
    shard = tmp_path / "same" / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes() + b"\0")
    (tmp_path / "same" / "tokenizer.json").write_text("{}")
    longer = read_model_files(tmp_path / "same")
    assert {
        name for name, digest in longer.parts.items() if read_model_files(DEMO).parts[name] != digest
    } == {shard.name, "tokenizer.json"}
    shard.unlink()
    assert shard.name in read_model_files(tmp_path / "same").problem
    assert "not a directory" in read_model_files(tmp_path / "nowhere").problem


def test_a_model_file_that_may_not_be_read_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Path.open

    def refuse(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self.name == "model-00002-of-00002.safetensors":
            raise PermissionError(13, "Permission denied", str(self))
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    found = read_model_files(DEMO)
    assert found.problem == f"{DEMO / 'model-00002-of-00002.safetensors'}: cannot be read: Permission denied"
    assert "config.json" in found.parts


# --------------------------------------------------------------------------- between nodes


def test_a_call_measures_both_time_and_rate() -> None:
    listener = Listener("127.0.0.1", TOKEN)
    try:
        [link] = call("here", [Peer("there", "127.0.0.1", listener.port)], TOKEN, measure=True)
        assert (link.source, link.target, link.problem) == ("here", "there", "")
        assert 0 < link.round_trip < 0.5
        assert link.rate > 1e6
        [link] = call("here", [Peer("there", "127.0.0.1", listener.port)], TOKEN, measure=False)
        assert link.rate == 0.0
        [link] = call("here", [Peer("there", "127.0.0.1", listener.port)], b"x" * len(TOKEN), measure=False)
        assert "closed by the other end" in link.problem or "reset" in link.problem
    finally:
        listener.close()


def test_a_node_that_is_not_reached_is_named_with_its_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    [link] = call("here", [Peer("there", "127.0.0.1", port)], TOKEN, measure=False)
    assert link.problem == f"127.0.0.1:{port}: Connection refused"


def test_one_that_accepts_and_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lockstep.launch.preflight.reach.CONNECT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        [link] = call("here", [Peer("there", "127.0.0.1", mute.getsockname()[1])], TOKEN, measure=False)
    assert link.problem.endswith("no answer within 0.2 s")


def test_the_interface_of_an_address() -> None:
    assert interface_of("127.0.0.1") == interface_of("::1") == "lo"
    assert interface_of("192.0.2.254") is None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("198.51.100.1", 9))  # sends nothing; picks the way out
        except OSError:
            pytest.skip("this machine has no way out, so no address beside the loopback")
        assert interface_of(probe.getsockname()[0]) in dict(socket.if_nameindex()).values()
