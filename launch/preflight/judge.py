"""From what nodes answered to findings. Nothing is asked here: the same answers give the same
findings.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

import msgspec

from ..capacity.plan import size_text
from .finding import Finding, Level
from .probe import Gpu, NodeFacts

# Soft limits below these are too low: descriptors for libraries and logs, and per rank of the
# cluster those of its connections.
_FILES, _FILES_PER_RANK = 256, 8
_FILES_FOR_CLIENTS = 4096  # below this a frontend runs out of connections before it is busy
_MEMLOCK = 1 << 30  # RDMA adapters pin their buffers
_SHM_PER_RANK = 64 << 20  # NCCL's buffers between the GPUs of a node
_DISK_FULL, _DISK_LOW = 100 << 20, 1 << 30
_GPU_IN_USE = 0.95  # of a GPU's memory that is free when nobody else is on it
_SAME_EVERYWHERE = (
    "python",
    "lockstep",
    "torch",
    "ray",
    "cuda",
    "nccl",
)  # a different transformers only tokenises


class Requirements(msgspec.Struct, frozen=True, kw_only=True):
    """What a recipe asks of a node. ``device`` is cpu, cuda or auto; ``gpu`` part of the name that
    its GPUs should have, if known; ``rank_memory`` the bytes a rank takes at least, None where that
    is not known; ``shm`` bytes of ``/dev/shm`` per node.
    """

    world: int
    ranks_per_node: int
    num_nodes: int
    device: str
    gpu: str | None = None
    rank_memory: int | None = None
    shm: int = 0
    shm_per_gpu_rank: int = _SHM_PER_RANK

    def uses_gpus(self, nodes: Sequence[NodeFacts]) -> bool:
        return self.device == "cuda" or (self.device == "auto" and any(node.gpus for node in nodes))


def judge(nodes: Sequence[NodeFacts], wanted: Requirements) -> list[Finding]:
    """All that is found in the nodes' answers, the one of the launcher first."""
    gpus = wanted.uses_gpus(nodes)
    found = _unanswered(nodes) + _interfaces(nodes) + _versions(nodes) + _models(nodes)
    found += _gpus(nodes, wanted) if gpus else _host_memory(nodes, wanted)
    found += _shared_memory(nodes, wanted, gpus) + _limits(nodes, wanted, gpus) + _disks(nodes)
    return found + _rdma(nodes, wanted, gpus) + _numa(nodes)


def _unanswered(nodes: Sequence[NodeFacts]) -> list[Finding]:
    todo = "see that the node can answer this"
    return [
        Finding("error", name, why, str(node), todo) for node in nodes for name, why in node.failed.items()
    ]


def _interfaces(nodes: Sequence[NodeFacts]) -> list[Finding]:
    """gloo and NCCL are told to use the interface of the address that Ray knows the node by."""
    todo = "start Ray there with --node-ip-address and an address that the node itself has"
    return [
        Finding("error", "network", f"no interface has the address {node.address}", str(node), todo)
        for node in nodes
        if node.address and node.interface is None and "interface" not in node.failed
    ]


def _groups(values: Iterable[tuple[NodeFacts, Hashable]]) -> dict[Hashable, list[str]]:
    """The names of nodes by what they have, what most have first."""
    by_value: dict[Hashable, list[str]] = {}
    for node, value in values:
        by_value.setdefault(value, []).append(str(node))
    return dict(sorted(by_value.items(), key=lambda item: -len(item[1])))


def _text(values: Iterable[str]) -> str:
    return ", ".join(sorted(values)) or "none"


def _differences(groups: dict[Hashable, list[str]]) -> str:
    return ", ".join(f"{value} on {' and '.join(names)}" for value, names in groups.items())


# --------------------------------------------------------------------------- equal on all nodes


def _versions(nodes: Sequence[NodeFacts]) -> list[Finding]:
    known = [node for node in nodes if node.versions is not None]
    names = sorted(
        {name for node in known for name in node.versions or {}},
        key=lambda name: (name not in _SAME_EVERYWHERE, name),
    )
    found, equal = [], []
    for name in names:
        groups = _groups((node, (node.versions or {}).get(name, "none")) for node in known)
        if len(groups) > 1:
            level: Level = "error" if name in _SAME_EVERYWHERE else "warning"
            found.append(
                Finding(
                    level,
                    "versions",
                    f"{name} is {_differences(groups)}",
                    "",
                    "install the same version on every node",
                )
            )
        else:
            equal.append(f"{name} {next(iter(groups))}")
    return found + ([Finding("ok", "versions", ", ".join(equal))] if equal else [])


def _models(nodes: Sequence[NodeFacts]) -> list[Finding]:
    found, sound = [], []
    for node in nodes:
        if node.model is None:
            continue
        if node.model.problem:
            todo = "copy the whole checkpoint there, or correct model.path"
            found.append(Finding("error", "model", node.model.problem, str(node), todo))
        else:
            sound.append(node)
    if not sound:
        return found
    files = sorted({name for node in sound for name in (node.model.parts if node.model else {})})
    for name in files:
        groups = _groups((node, (node.model.parts if node.model else {}).get(name)) for node in sound)
        if len(groups) > 1:
            most, *others = groups.values()
            text = f"{name} is not the same on {', '.join(node for names in others for node in names)} as on {most[0]}"
            found.append(Finding("error", "model", text, "", "copy the same checkpoint to every node"))
    if not found and sound[0].model is not None:
        model = sound[0].model
        found.append(
            Finding(
                "ok", "model", f"{model.folder}: {model.num_tensors} tensors, {size_text(model.num_bytes)}"
            )
        )
    return found


# --------------------------------------------------------------------------- devices and memory


def _gpus(nodes: Sequence[NodeFacts], wanted: Requirements) -> list[Finding]:
    known = [node for node in nodes if node.gpus is not None]
    found = []
    for node in known:
        gpus = node.gpus or ()
        if len(gpus) < wanted.ranks_per_node:
            text = f"{len(gpus)} GPUs, and cluster.ranks_per_node is {wanted.ranks_per_node}"
            found.append(
                Finding(
                    "error",
                    "GPUs",
                    text,
                    str(node),
                    "lower cluster.ranks_per_node, or see what nvidia-smi says there",
                )
            )
        found += [
            line
            for index, gpu in enumerate(gpus[: wanted.ranks_per_node])
            if (line := _gpu(node, index, gpu, wanted))
        ]
    for what in ("name", "driver"):
        groups = _groups((node, _text({getattr(gpu, what) for gpu in node.gpus or ()})) for node in known)
        if len(groups) > 1:
            found.append(
                Finding("warning", "GPUs", f"{what}: {_differences(groups)}", "", "use nodes that are alike")
            )
    if known and not any(finding.level == "error" for finding in found):
        first = (known[0].gpus or ())[0]
        found.append(
            Finding("ok", "GPUs", f"{wanted.ranks_per_node} x {first.name} on a node, driver {first.driver}")
        )
    return found


def _gpu(node: NodeFacts, index: int, gpu: Gpu, wanted: Requirements) -> Finding | None:
    have = f"GPU {index} ({gpu.name}) has {size_text(gpu.free)} free"
    if wanted.rank_memory is not None and gpu.memory and gpu.free < wanted.rank_memory:
        todo = "end what else runs there, or see launch plan"
        return Finding(
            "error",
            "GPU memory",
            f"{have}, and a rank takes {size_text(wanted.rank_memory)}",
            str(node),
            todo,
        )
    if gpu.free < _GPU_IN_USE * gpu.memory:
        return Finding(
            "warning",
            "GPU memory",
            f"{have} of {size_text(gpu.memory)}",
            str(node),
            "end what else runs there",
        )
    if wanted.gpu is not None and wanted.gpu.lower() not in gpu.name.lower():
        text = f"GPU {index} is {gpu.name}, and cluster.hardware is {wanted.gpu}"
        return Finding(
            "warning", "GPUs", text, str(node), "name the profile of these GPUs, for launch plan to be right"
        )
    return None


def _host_memory(nodes: Sequence[NodeFacts], wanted: Requirements) -> list[Finding]:
    found = []
    for node in nodes:
        if node.memory is None:
            continue
        have = f"{size_text(node.memory)} available"
        if wanted.rank_memory is None:
            found.append(
                Finding(
                    "ok",
                    "memory",
                    f"{have}; not compared with the plan, which needs cluster.hardware",
                    str(node),
                )
            )
            continue
        need = wanted.rank_memory * wanted.ranks_per_node
        text = f"{have}, and {wanted.ranks_per_node} ranks take {size_text(need)}"
        if node.memory < need:
            found.append(
                Finding(
                    "error",
                    "memory",
                    text,
                    str(node),
                    "end what else runs there, or lower kv_cache.memory; see launch plan",
                )
            )
        else:
            found.append(Finding("ok", "memory", text, str(node)))
    return found


def _shared_memory(nodes: Sequence[NodeFacts], wanted: Requirements, gpus: bool) -> list[Finding]:
    nccl = wanted.ranks_per_node * wanted.shm_per_gpu_rank if gpus and wanted.ranks_per_node > 1 else 0
    need = nccl + wanted.shm
    found = []
    for node in nodes:
        if node.shm is None:
            continue
        text = f"{size_text(node.shm)} free in /dev/shm"
        if node.shm < need:
            who = "NCCL fails" if nccl else "Ray uses a disk instead"
            todo = "give it more (docker run --shm-size, or mount -o remount,size= /dev/shm)"
            level: Level = "error" if nccl else "warning"
            found.append(
                Finding(level, "shared memory", f"{text}; {who} below {size_text(need)}", str(node), todo)
            )
        else:
            found.append(Finding("ok", "shared memory", text, str(node)))
    return found


def _limits(nodes: Sequence[NodeFacts], wanted: Requirements, gpus: bool) -> list[Finding]:
    least = _FILES + _FILES_PER_RANK * wanted.world
    found = []
    for node in nodes:
        if node.limits is None:
            continue
        files, memlock = node.limits.open_files, node.limits.memlock
        if 0 <= files < least:
            todo = f"raise it (ulimit -n {max(least, 65536)}) where Ray is started"
            found.append(
                Finding(
                    "error",
                    "limits",
                    f"{files} open files, and {wanted.world} ranks take {least}",
                    str(node),
                    todo,
                )
            )
        elif 0 <= files < _FILES_FOR_CLIENTS:
            todo = "raise it (ulimit -n 65536) where Ray is started"
            found.append(
                Finding(
                    "warning",
                    "limits",
                    f"{files} open files bound the connections of clients",
                    str(node),
                    todo,
                )
            )
        if gpus and node.rdma and 0 <= memlock < _MEMLOCK:
            text = f"{size_text(memlock)} of locked memory; RDMA fails below {size_text(_MEMLOCK)}"
            found.append(
                Finding("error", "limits", text, str(node), "ulimit -l unlimited where Ray is started")
            )
    return found or [
        Finding("ok", "limits", f"open files and locked memory suffice for {wanted.world} ranks")
    ]


def _disks(nodes: Sequence[NodeFacts]) -> list[Finding]:
    found = []
    for node in nodes:
        for disk in node.disks or ():
            text = f"{disk.path}: {size_text(disk.free)} free"
            if disk.problem:
                found.append(
                    Finding(
                        "error",
                        "disk",
                        disk.problem,
                        str(node),
                        "choose another cluster.log_dir or recording",
                    )
                )
            elif disk.free < _DISK_LOW:
                level: Level = "error" if disk.free < _DISK_FULL else "warning"
                found.append(Finding(level, "disk", text, str(node), "make room for logs and recordings"))
            else:
                found.append(Finding("ok", "disk", text, str(node)))
    return found


# --------------------------------------------------------------------------- adapters


def _rdma(nodes: Sequence[NodeFacts], wanted: Requirements, gpus: bool) -> list[Finding]:
    known = [node for node in nodes if node.rdma is not None]
    found = []
    for node in known:
        down = [f"{port.name} is {port.state}" for port in node.rdma or () if port.state != "ACTIVE"]
        if down:
            found.append(
                Finding("warning", "RDMA", ", ".join(down), str(node), "see ibstat there, and the cable")
            )
        if gpus and wanted.num_nodes > 1 and not node.rdma:
            text = "no RDMA device: exchanges with other nodes go through TCP"
            found.append(
                Finding(
                    "warning",
                    "RDMA",
                    text,
                    str(node),
                    "load the adapter's driver, and pass /dev/infiniband into containers",
                )
            )
    groups = _groups(
        (node, _text({port.rate for port in node.rdma or () if port.state == "ACTIVE"})) for node in known
    )
    if len(groups) > 1:
        found.append(
            Finding(
                "warning", "RDMA", f"active ports: {_differences(groups)}", "", "use nodes that are alike"
            )
        )
    elif known and known[0].rdma and not found:
        found.append(Finding("ok", "RDMA", f"{len(known[0].rdma)} ports on a node, {next(iter(groups))}"))
    return found


def _numa(nodes: Sequence[NodeFacts]) -> list[Finding]:
    groups = _groups((node, node.numa) for node in nodes if node.numa is not None)
    if len(groups) > 1:
        return [
            Finding(
                "warning", "NUMA", f"nodes of memory: {_differences(groups)}", "", "use nodes that are alike"
            )
        ]
    return [Finding("ok", "NUMA", f"{next(iter(groups))} on a node")] if groups else []
