"""Findings for nodes' answers: every fault alone, in the answers of two otherwise equal nodes."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from lockstep.launch.preflight.finding import Finding, exit_status, to_json
from lockstep.launch.preflight.judge import Requirements, judge
from lockstep.launch.preflight.links import Clock, judge_clocks, judge_links
from lockstep.launch.preflight.model_files import ModelFiles
from lockstep.launch.preflight.probe import Disk, Gpu, NodeFacts, Port, ProcessLimits, parse_gpus
from lockstep.launch.preflight.reach import Link

GIB = 1 << 30
H100 = Gpu("NVIDIA H100 80GB HBM3", 80 * GIB, 79 * GIB, "570.86")
MODEL = ModelFiles("/models/m", "", 345, 5 * GIB, {"config.json": "a", "model.safetensors": "b"})
RDMA = (Port("mlx5_0:1", "ACTIVE", "400 Gb/sec (4X NDR)"),)
GOOD = NodeFacts(
    name="alpha",
    address="10.0.0.2",
    interface="eth0",
    versions={
        "python": "3.11.7",
        "lockstep": "0.1.0",
        "torch": "2.13.0",
        "ray": "2.60.0",
        "transformers": "5.1",
    }
    | {"cuda": "12.8", "nccl": "2.27.3"},
    gpus=(H100, H100),
    memory=64 * GIB,
    shm=8 * GIB,
    model=MODEL,
    rdma=RDMA,
    numa=2,
    limits=ProcessLimits(65536, -1),
    disks=(Disk("/var/log", 100 * GIB),),
)
ON_GPUS = Requirements(
    world=4, ranks_per_node=2, num_nodes=2, device="cuda", gpu="h100", rank_memory=60 * GIB
)
ON_CPUS = Requirements(world=4, ranks_per_node=2, num_nodes=2, device="cpu", rank_memory=20 * GIB)


def beta(**changed: Any) -> NodeFacts:
    return msgspec.structs.replace(GOOD, name="beta", address="10.0.0.3", **changed)


def bad(found: list[Finding]) -> list[Finding]:
    return [finding for finding in found if finding.level != "ok"]


@pytest.mark.parametrize("wanted", [ON_GPUS, ON_CPUS])
def test_two_equal_nodes_are_fine_and_every_subject_is_reported(wanted: Requirements) -> None:
    found = judge([GOOD, beta()], wanted)
    assert bad(found) == []
    assert exit_status(found) == 0
    memory = "GPUs" if wanted is ON_GPUS else "memory"
    assert {finding.subject for finding in found} == {
        "versions",
        "model",
        memory,
        "shared memory",
        "limits",
        "disk",
        "RDMA",
        "NUMA",
    }


def version(name: str, value: str) -> dict[str, Any]:
    return {"versions": {**(GOOD.versions or {}), name: value}}


ALPHA, BETA = "alpha (10.0.0.2)", "beta (10.0.0.3)"


def gpu(**changed: Any) -> dict[str, Any]:
    """Answers with a different second GPU."""
    return {"gpus": (H100, msgspec.structs.replace(H100, **changed))}


def model(**changed: Any) -> dict[str, Any]:
    return {"model": msgspec.structs.replace(MODEL, **changed)}


def rdma(state: str, rate: str) -> dict[str, Any]:
    return {"rdma": (Port("mlx5_0:1", state, rate),)}


FAULTS: list[tuple[str, dict[str, Any], str, str, str]] = [
    # what, the change to the second node, level, subject, words of the line
    (
        "python",
        version("python", "3.12.1"),
        "error",
        "versions",
        f"python is 3.11.7 on {ALPHA}, 3.12.1 on {BETA}",
    ),
    ("lockstep", version("lockstep", "0.2.0"), "error", "versions", f"lockstep is 0.1.0 on {ALPHA}"),
    (
        "torch",
        version("torch", "2.12.0"),
        "error",
        "versions",
        f"torch is 2.13.0 on {ALPHA}, 2.12.0 on {BETA}; install the same",
    ),
    ("cuda", version("cuda", "13.0"), "error", "versions", f"cuda is 12.8 on {ALPHA}, 13.0"),
    ("nccl", version("nccl", "2.26.0"), "error", "versions", f"nccl is 2.27.3 on {ALPHA}, 2.26.0"),
    (
        "two NCCLs",
        {"versions": {**(GOOD.versions or {}), "nvidia-nccl-cu12": "2.27.3", "nvidia-nccl-cu13": "2.28.9"}},
        "error",
        "NCCL",
        f"{BETA}: nvidia-nccl-cu12 and nvidia-nccl-cu13 are both installed; uninstall both",
    ),
    (
        "transformers",
        version("transformers", "5.2"),
        "warning",
        "versions",
        f"transformers is 5.1 on {ALPHA}, 5.2",
    ),
    ("driver", gpu(driver="560"), "warning", "GPUs", f"driver: 570.86 on {ALPHA}, 560, 570.86 on {BETA}"),
    (
        "too few GPUs",
        {"gpus": (H100,)},
        "error",
        "GPUs",
        f"{BETA}: 1 GPUs, and cluster.ranks_per_node is 2; lower",
    ),
    ("no GPU", {"gpus": ()}, "error", "GPUs", f"{BETA}: 0 GPUs"),
    (
        "other GPU",
        gpu(name="NVIDIA A100"),
        "warning",
        "GPUs",
        f"{BETA}: GPU 1 is NVIDIA A100, and cluster.hardware is h100",
    ),
    (
        "used GPU",
        gpu(free=70 * GIB),
        "warning",
        "GPU memory",
        "GPU 1 (NVIDIA H100 80GB HBM3) has 70.0 GiB free of 80.0 GiB; end",
    ),
    ("full GPU", gpu(free=59 * GIB), "error", "GPU memory", "59.0 GiB free, and a rank takes 60.0 GiB; end"),
    (
        "shm",
        {"shm": 64 << 20},
        "error",
        "shared memory",
        f"{BETA}: 64.0 MiB free in /dev/shm; NCCL fails below 128.0 MiB; enlarge",
    ),
    (
        "model broken",
        model(problem="/m/x.safetensors: truncated"),
        "error",
        "model",
        f"{BETA}: /m/x.safetensors: truncated; copy",
    ),
    (
        "model differs",
        model(parts=MODEL.parts | {"model.safetensors": "c"}),
        "error",
        "model",
        "model.safetensors is not the same on",
    ),
    (
        "model lacks",
        model(parts={"model.safetensors": "b"}),
        "error",
        "model",
        f"config.json is not the same on {BETA} as on {ALPHA}",
    ),
    (
        "files",
        {"limits": ProcessLimits(256, -1)},
        "error",
        "limits",
        f"{BETA}: 256 open files, and 4 ranks take 288; raise it",
    ),
    (
        "clients",
        {"limits": ProcessLimits(1024, -1)},
        "warning",
        "limits",
        f"{BETA}: 1024 open files limit client connections",
    ),
    (
        "memlock",
        {"limits": ProcessLimits(65536, 8 << 20)},
        "error",
        "limits",
        f"{BETA}: 8.0 MiB of locked memory; RDMA fails below",
    ),
    (
        "disk full",
        {"disks": (Disk("/var/log", 10 << 20),)},
        "error",
        "disk",
        f"{BETA}: /var/log: 10.0 MiB free; make room",
    ),
    (
        "disk low",
        {"disks": (Disk("/var/log", 500 << 20),)},
        "warning",
        "disk",
        f"{BETA}: /var/log: 500.0 MiB free",
    ),
    (
        "no disk",
        {"disks": (Disk("/x", GIB, "/x: no folder"),)},
        "error",
        "disk",
        f"{BETA}: /x: no folder; choose another",
    ),
    (
        "no RDMA",
        {"rdma": ()},
        "warning",
        "RDMA",
        f"{BETA}: no RDMA device: exchanges with other nodes go through TCP",
    ),
    (
        "link down",
        rdma("DOWN", "10 Gb/sec"),
        "warning",
        "RDMA",
        f"{BETA}: mlx5_0:1 is DOWN; see ibstat there",
    ),
    (
        "slower",
        rdma("ACTIVE", "200 Gb/sec"),
        "warning",
        "RDMA",
        f"active ports: 400 Gb/sec (4X NDR) on {ALPHA}, 200 Gb/sec on {BETA}",
    ),
    (
        "interface",
        {"interface": None},
        "error",
        "network",
        f"{BETA}: no interface has the address 10.0.0.3; start Ray there with",
    ),
    ("NUMA", {"numa": 1}, "warning", "NUMA", f"NUMA nodes: 2 on {ALPHA}, 1 on {BETA}"),
    (
        "late",
        {"gpus": None, "failed": {"gpus": "no answer within 20 s"}},
        "error",
        "gpus",
        f"{BETA}: no answer within 20 s",
    ),
]


@pytest.mark.parametrize(
    ("changed", "level", "subject", "words"),
    [fault[1:] for fault in FAULTS],
    ids=[fault[0] for fault in FAULTS],
)
def test_a_fault_is_one_line_that_says_what_where_and_what_to_do(
    changed: dict[str, Any], level: str, subject: str, words: str
) -> None:
    found = bad(judge([GOOD, beta(**changed)], ON_GPUS))
    named = [finding for finding in found if words in str(finding)]
    assert [(finding.level, finding.subject) for finding in named[:1]] == [(level, subject)], found
    assert all(finding.todo for finding in found)
    assert all("\n" not in str(finding) for finding in found)
    assert exit_status(found) == (1 if any(finding.level == "error" for finding in found) else 3)


def test_ranks_on_cpus_need_host_memory_and_no_adapters() -> None:
    [finding] = bad(
        judge([GOOD, beta(memory=30 * GIB, rdma=(), gpus=(), limits=ProcessLimits(65536, 0))], ON_CPUS)[:5]
    )
    assert finding.level == "error"
    assert str(finding).startswith(
        "memory: beta (10.0.0.3): 30.0 GiB available, and 2 ranks take 40.0 GiB; end other processes"
    )


def test_without_a_plan_memory_is_only_told() -> None:
    found = judge([GOOD], msgspec.structs.replace(ON_CPUS, rank_memory=None))
    assert [str(finding) for finding in found if finding.subject == "memory"] == [
        f"memory: {ALPHA}: 64.0 GiB available; not compared with the plan, which needs cluster.hardware"
    ]


def test_shared_memory_for_a_ray_of_our_own_is_a_warning() -> None:
    wanted = msgspec.structs.replace(ON_CPUS, shm=100 << 20)
    [finding] = bad(judge([msgspec.structs.replace(GOOD, shm=8 << 20)], wanted))
    assert (finding.level, finding.subject) == ("warning", "shared memory")
    assert "Ray uses a disk instead below 100.0 MiB" in finding.text


def test_auto_is_gpus_where_a_node_has_some() -> None:
    wanted = msgspec.structs.replace(ON_GPUS, device="auto")
    assert wanted.uses_gpus([GOOD])
    assert not wanted.uses_gpus([msgspec.structs.replace(GOOD, gpus=())])
    assert [finding.subject for finding in bad(judge([GOOD, beta(gpus=())], wanted))] == [
        "GPUs",
        "GPUs",
        "GPUs",
    ]


def test_links() -> None:
    links = [
        Link("alpha", "beta", "", 1e-4, 2e9),
        Link("beta", "alpha", "10.0.0.2:999: no answer within 3 s"),
        Link("alpha", "gamma", "", 5e-3, 2e9),
        Link("gamma", "alpha", "", 1e-4, 50e6),
    ]
    refused, slow, narrow, summary = judge_links(links)
    assert (refused.level, slow.level, narrow.level, summary.level) == ("error", "warning", "warning", "ok")
    assert str(refused).startswith(
        "network: beta -> alpha: 10.0.0.2:999: no answer within 3 s; open TCP from beta to alpha"
    )
    assert "alpha -> gamma: 5.00 ms per round trip" in str(slow)
    assert "gamma -> alpha: 50 MB/s" in str(narrow)
    assert "3 of 4 directions work, round trip 0.10 ms, at most 5.00, 0.05 to 2.00 GB/s" in str(summary)
    assert [finding.level for finding in judge_links([])] == []


def test_clocks() -> None:
    assert [
        finding.level for finding in judge_clocks([Clock("alpha", 0.0, 0.001), Clock("beta", 1.2, 0.3)])
    ] == ["ok"]
    [finding] = judge_clocks([Clock("alpha", 0.0, 0.001), Clock("beta", -61.0, 0.01)])
    assert str(finding).startswith("clock: beta: -61.0 s from the launcher's; run chrony")


def test_json_and_status() -> None:
    ok, warning, error = (
        Finding("ok", "a", "b"),
        Finding("warning", "a", "b"),
        Finding("error", "a", "b", "here", "do this"),
    )
    assert [exit_status(found) for found in ([], [ok], [ok, warning], [warning, error])] == [0, 0, 3, 1]
    assert to_json([error]) == {
        "status": 1,
        "findings": [{"level": "error", "subject": "a", "text": "b", "where": "here", "todo": "do this"}],
    }


def test_what_nvidia_smi_prints_is_read() -> None:
    text = "NVIDIA H100 80GB HBM3, 81559, 81076, 570.86.15\nNVIDIA GH200 480GB, [N/A], [N/A], 570.86.15\n"
    assert parse_gpus(text) == (
        Gpu("NVIDIA H100 80GB HBM3", 81559 << 20, 81076 << 20, "570.86.15"),
        Gpu("NVIDIA GH200 480GB", 0, 0, "570.86.15"),
    )
