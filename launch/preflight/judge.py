"""Judges the answers of nodes. Pure: the same answers give the same findings."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

import msgspec

from ..capacity.plan import size_text
from .finding import Finding
from .model_files import ModelFiles
from .probe import NCCL_PACKAGES, Gpu, NodeFacts

# Least open files: for libraries and logs, and for the connections to every rank of the cluster.
_FILES, _FILES_PER_RANK = 256, 8
_FILES_FOR_CLIENTS = 4096  # with fewer a frontend runs out of connections before it is busy
_MEMLOCK = 1 << 30  # RDMA adapters pin their buffers
_SHM_PER_RANK = 64 << 20  # NCCL's buffers between the GPUs of a node
_DISK_FULL = 100 << 20
_DISK_LOW = 1 << 30
_GPU_IN_USE = 0.95  # share of memory that is free on an unused GPU
# Different versions of these break a cluster; a different transformers only tokenises.
_SAME_EVERYWHERE = ("python", "lockstep", "torch", "ray", "cuda", "nccl")


class Requirements(msgspec.Struct, frozen=True, kw_only=True):
    """Requirements of a recipe on its nodes.

    ``device``: cpu, cuda or auto. ``gpu``: part of the name its GPUs should have, if known.
    ``rank_memory``: least bytes of a rank, if known. ``shm``: bytes of ``/dev/shm`` per node.
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


def judge(nodes: Sequence[NodeFacts], requirements: Requirements) -> list[Finding]:
    """All findings in the nodes' answers, the launcher's node first."""
    gpus = requirements.uses_gpus(nodes)
    found = _unanswered(nodes) + _interfaces(nodes) + _versions(nodes) + _two_nccls(nodes) + _models(nodes)
    found += _gpus(nodes, requirements) if gpus else _host_memory(nodes, requirements)
    found += _shared_memory(nodes, requirements, gpus) + _limits(nodes, requirements, gpus) + _disks(nodes)
    return found + _rdma(nodes, requirements, gpus) + _numa(nodes)


def _error(subject: str, text: str, where: object = "", todo: str = "") -> Finding:
    return Finding("error", subject, text, str(where), todo)


def _warning(subject: str, text: str, where: object = "", todo: str = "") -> Finding:
    return Finding("warning", subject, text, str(where), todo)


def _ok(subject: str, text: str, where: object = "") -> Finding:
    return Finding("ok", subject, text, str(where))


def _unanswered(nodes: Sequence[NodeFacts]) -> list[Finding]:
    todo = "check why the node cannot answer this"
    return [_error(name, reason, node, todo) for node in nodes for name, reason in node.failed.items()]


def _interfaces(nodes: Sequence[NodeFacts]) -> list[Finding]:
    """gloo and NCCL will use the interface that has the node's address in the Ray cluster."""
    todo = "start Ray there with --node-ip-address and an address that the node itself has"
    return [
        _error("network", f"no interface has the address {node.address}", node, todo)
        for node in nodes
        if node.address and node.interface is None and "interface" not in node.failed
    ]


def _groups(values: Iterable[tuple[NodeFacts, Hashable]]) -> dict[Hashable, list[str]]:
    """Names of nodes by value, the most frequent value first."""
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
    names = {name for node in known for name in node.versions or {}}
    found, equal = [], []
    for name in sorted(names, key=lambda name: (name not in _SAME_EVERYWHERE, name)):
        groups = _groups((node, (node.versions or {}).get(name, "none")) for node in known)
        if len(groups) == 1:
            equal.append(f"{name} {next(iter(groups))}")
            continue
        report = _error if name in _SAME_EVERYWHERE else _warning
        todo = "install the same version on every node"
        found.append(report("versions", f"{name} is {_differences(groups)}", "", todo))
    return found + ([_ok("versions", ", ".join(equal))] if equal else [])


def _two_nccls(nodes: Sequence[NodeFacts]) -> list[Finding]:
    """Both packages write to one folder, so torch loads the one that was installed last."""
    todo = "uninstall both, and install torch anew: it brings the NCCL of its CUDA"
    return [
        _error("NCCL", f"{' and '.join(NCCL_PACKAGES)} are both installed", node, todo)
        for node in nodes
        if set(NCCL_PACKAGES) <= set(node.versions or {})
    ]


def _models(nodes: Sequence[NodeFacts]) -> list[Finding]:
    found = []
    sound: list[tuple[NodeFacts, ModelFiles]] = []
    for node in nodes:
        if node.model is None:
            continue
        if node.model.problem:
            todo = "copy the whole checkpoint there, or correct model.path"
            found.append(_error("model", node.model.problem, node, todo))
        else:
            sound.append((node, node.model))
    for name in sorted({name for _, model in sound for name in model.parts}):
        groups = _groups((node, model.parts.get(name)) for node, model in sound)
        if len(groups) > 1:
            most, *others = groups.values()
            names = ", ".join(node for names in others for node in names)
            text = f"{name} is not the same on {names} as on {most[0]}"
            found.append(_error("model", text, "", "copy the same checkpoint to every node"))
    if sound and not found:
        model = sound[0][1]
        text = f"{model.folder}: {model.num_tensors} tensors, {size_text(model.num_bytes)}"
        if not model.num_tensors:
            text = f"{model.folder}: random weights as its description says"
        found.append(_ok("model", text))
    return found


# --------------------------------------------------------------------------- devices and memory


def _gpus(nodes: Sequence[NodeFacts], requirements: Requirements) -> list[Finding]:
    known = [(node, node.gpus) for node in nodes if node.gpus is not None]
    count = requirements.ranks_per_node
    found = []
    for node, gpus in known:
        if len(gpus) < count:
            text = f"{len(gpus)} GPUs, and cluster.ranks_per_node is {count}"
            todo = "lower cluster.ranks_per_node, or run nvidia-smi there"
            found.append(_error("GPUs", text, node, todo))
        found += [
            finding
            for index, gpu in enumerate(gpus[:count])
            if (finding := _gpu(node, index, gpu, requirements))
        ]
    for what in ("name", "driver"):
        groups = _groups((node, _text({getattr(gpu, what) for gpu in gpus})) for node, gpus in known)
        if len(groups) > 1:
            found.append(_warning("GPUs", f"{what}: {_differences(groups)}", "", "use equal nodes"))
    if known and not any(finding.level == "error" for finding in found):
        first = known[0][1][0]
        found.append(_ok("GPUs", f"{count} x {first.name} on a node, driver {first.driver}"))
    return found


def _gpu(node: NodeFacts, index: int, gpu: Gpu, requirements: Requirements) -> Finding | None:
    have = f"GPU {index} ({gpu.name}) has {size_text(gpu.free)} free"
    need = requirements.rank_memory
    if need is not None and gpu.memory and gpu.free < need:
        todo = "end other processes there, or see launch plan"
        return _error("GPU memory", f"{have}, and a rank takes {size_text(need)}", node, todo)
    if gpu.free < _GPU_IN_USE * gpu.memory:
        return _warning("GPU memory", f"{have} of {size_text(gpu.memory)}", node, "end other processes there")
    if requirements.gpu is not None and requirements.gpu.lower() not in gpu.name.lower():
        text = f"GPU {index} is {gpu.name}, and cluster.hardware is {requirements.gpu}"
        return _warning("GPUs", text, node, "name the profile of these GPUs, so that launch plan is right")
    return None


def _host_memory(nodes: Sequence[NodeFacts], requirements: Requirements) -> list[Finding]:
    count = requirements.ranks_per_node
    found = []
    for node in nodes:
        if node.memory is None:
            continue
        have = f"{size_text(node.memory)} available"
        if requirements.rank_memory is None:
            text = f"{have}; not compared with the plan, which needs cluster.hardware"
            found.append(_ok("memory", text, node))
            continue
        need = requirements.rank_memory * count
        text = f"{have}, and {count} ranks take {size_text(need)}"
        if node.memory < need:
            todo = "end other processes there, or lower kv_cache.memory; see launch plan"
            found.append(_error("memory", text, node, todo))
        else:
            found.append(_ok("memory", text, node))
    return found


def _shared_memory(nodes: Sequence[NodeFacts], requirements: Requirements, gpus: bool) -> list[Finding]:
    count = requirements.ranks_per_node
    nccl = count * requirements.shm_per_gpu_rank if gpus and count > 1 else 0
    need = nccl + requirements.shm
    found = []
    for node in nodes:
        if node.shm is None:
            continue
        text = f"{size_text(node.shm)} free in /dev/shm"
        if node.shm >= need:
            found.append(_ok("shared memory", text, node))
            continue
        report, effect = (_error, "NCCL fails") if nccl else (_warning, "Ray uses a disk instead")
        todo = "enlarge it (docker run --shm-size, or mount -o remount,size= /dev/shm)"
        found.append(report("shared memory", f"{text}; {effect} below {size_text(need)}", node, todo))
    return found


def _limits(nodes: Sequence[NodeFacts], requirements: Requirements, gpus: bool) -> list[Finding]:
    world = requirements.world
    least = _FILES + _FILES_PER_RANK * world
    found = []
    for node in nodes:
        if node.limits is None:
            continue
        files, memlock = node.limits.open_files, node.limits.memlock
        if 0 <= files < least:
            todo = f"raise it (ulimit -n {max(least, 65536)}) where Ray is started"
            found.append(_error("limits", f"{files} open files, and {world} ranks take {least}", node, todo))
        elif 0 <= files < _FILES_FOR_CLIENTS:
            todo = "raise it (ulimit -n 65536) where Ray is started"
            found.append(_warning("limits", f"{files} open files limit client connections", node, todo))
        if gpus and node.rdma and 0 <= memlock < _MEMLOCK:
            text = f"{size_text(memlock)} of locked memory; RDMA fails below {size_text(_MEMLOCK)}"
            found.append(_error("limits", text, node, "ulimit -l unlimited where Ray is started"))
    return found or [_ok("limits", f"enough open files and locked memory for {world} ranks")]


def _disks(nodes: Sequence[NodeFacts]) -> list[Finding]:
    found = []
    disks = [(owner, disk) for owner in nodes for disk in owner.disks or ()]
    for node, disk in disks:
        text = f"{disk.path}: {size_text(disk.free)} free"
        if disk.problem:
            found.append(_error("disk", disk.problem, node, "choose another cluster.log_dir or recording"))
        elif disk.free < _DISK_LOW:
            report = _error if disk.free < _DISK_FULL else _warning
            found.append(report("disk", text, node, "make room for logs and recordings"))
        else:
            found.append(_ok("disk", text, node))
    return found


# --------------------------------------------------------------------------- adapters


def _rdma(nodes: Sequence[NodeFacts], requirements: Requirements, gpus: bool) -> list[Finding]:
    known = [(node, node.rdma) for node in nodes if node.rdma is not None]
    found = []
    for node, ports in known:
        down = [f"{port.name} is {port.state}" for port in ports if port.state != "ACTIVE"]
        if down:
            found.append(_warning("RDMA", ", ".join(down), node, "see ibstat there, and the cable"))
        if gpus and requirements.num_nodes > 1 and not ports:
            todo = "load the adapter's driver, and pass /dev/infiniband into containers"
            text = "no RDMA device: exchanges with other nodes go through TCP"
            found.append(_warning("RDMA", text, node, todo))
    groups = _groups(
        (node, _text({port.rate for port in ports if port.state == "ACTIVE"})) for node, ports in known
    )
    if len(groups) > 1:
        found.append(_warning("RDMA", f"active ports: {_differences(groups)}", "", "use equal nodes"))
    elif known and known[0][1] and not found:
        found.append(_ok("RDMA", f"{len(known[0][1])} ports on a node, {next(iter(groups))}"))
    return found


def _numa(nodes: Sequence[NodeFacts]) -> list[Finding]:
    groups = _groups((node, node.numa) for node in nodes if node.numa is not None)
    if len(groups) > 1:
        return [_warning("NUMA", f"NUMA nodes: {_differences(groups)}", "", "use equal nodes")]
    return [_ok("NUMA", f"{next(iter(groups))} on a node")] if groups else []
