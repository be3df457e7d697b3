"""Asks a node for its properties, on the node itself. Every question has a deadline.

Linux only: it reads ``/proc`` and ``/sys``. Unless ``thorough``, it only reads small files: no
import of torch, no nvidia-smi.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import re
import resource
import runpy
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

from ... import __version__
from ..cluster.network import interface_of
from .model_files import ModelFiles, read_model_files

QUESTION_SECONDS = 20.0
MODEL_SECONDS = 120.0
NCCL_PACKAGES = ("nvidia-nccl-cu12", "nvidia-nccl-cu13")
_NVIDIA_SMI = (
    "nvidia-smi",
    "--query-gpu=name,memory.total,memory.free,driver_version",
    "--format=csv,noheader,nounits",
)
_SHM = "/dev/shm"
_INFINIBAND = "sys/class/infiniband"
_NUMA = "sys/devices/system/node"


class Gpu(msgspec.Struct, frozen=True):
    """An NVIDIA GPU as nvidia-smi reports it; sizes in bytes."""

    name: str
    memory: int
    free: int
    driver: str


class Port(msgspec.Struct, frozen=True):
    """A port of an RDMA device. ``state``: ACTIVE if usable. ``rate``: the kernel's text."""

    name: str
    state: str
    rate: str


class Disk(msgspec.Struct, frozen=True):
    """Free bytes at ``path``; ``problem``: why no file can be written there, else empty."""

    path: str
    free: int
    problem: str = ""


class ProcessLimits(msgspec.Struct, frozen=True):
    """Soft limits of a process; -1: unlimited. ``memlock`` in bytes."""

    open_files: int
    memlock: int


class Questions(msgspec.Struct, frozen=True):
    """Questions to a node. ``root`` contains ``/sys`` and ``/proc``. ``weights`` are
    those of a recipe.
    """

    model: str
    folders: tuple[str, ...] = ()
    thorough: bool = True
    root: str = "/"
    seconds: float = QUESTION_SECONDS
    model_seconds: float = MODEL_SECONDS
    weights: str = "checkpoint"


class NodeFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The answers. One that failed or was late is None, and ``failed`` has the reason.

    Sizes in bytes. ``versions``: of Python and of packages that must be equal on all nodes.
    ``numa``: number of NUMA nodes.
    """

    name: str
    address: str = ""
    interface: str | None = None
    versions: dict[str, str] | None = None
    gpus: tuple[Gpu, ...] | None = None
    memory: int | None = None
    shm: int | None = None
    model: ModelFiles | None = None
    rdma: tuple[Port, ...] | None = None
    numa: int | None = None
    limits: ProcessLimits | None = None
    disks: tuple[Disk, ...] | None = None
    failed: dict[str, str] = {}

    def __str__(self) -> str:
        return f"{self.name} ({self.address})" if self.address else self.name


def look_around(questions: Questions, address: str = "") -> NodeFacts:
    """Answers all questions about this node concurrently. ``address``: its address for others."""
    root = Path(questions.root)
    asked: dict[str, Callable[[], object]] = {
        "versions": lambda: _versions(questions.thorough),
        "memory": lambda: _free_memory(root),
        "shm": lambda: shutil.disk_usage(_SHM).free,
        "model": lambda: read_model_files(Path(questions.model), questions.weights),
        "rdma": lambda: _rdma(root),
        "numa": lambda: len(list((root / _NUMA).glob("node[0-9]*"))),
        "limits": _limits,
        "disks": lambda: tuple(_disk(Path(folder)) for folder in questions.folders),
    }
    if questions.thorough:
        asked["gpus"] = lambda: _gpus(questions.seconds)
    if address:
        asked["interface"] = lambda: interface_of(address)
    deadlines = dict.fromkeys(asked, questions.seconds) | {"model": questions.model_seconds}
    answers, failed = ask(asked, deadlines)
    known: dict[str, Any] = answers
    return NodeFacts(name=socket.gethostname(), address=address, failed=failed, **known)


def ask(
    asked: dict[str, Callable[[], object]], deadlines: dict[str, float]
) -> tuple[dict[str, object], dict[str, str]]:
    """Asks all questions at once, each in its own thread; a dead file server may block one forever.

    Returns the answers that came in time, and the reason for each that did not.
    """
    answers: dict[str, object] = {}
    errors: dict[str, str] = {}

    def answer(name: str) -> None:
        try:
            answers[name] = asked[name]()
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {error}"

    threads = {
        name: threading.Thread(target=answer, args=(name,), name=f"probe {name}", daemon=True)
        for name in asked
    }
    start = time.monotonic()
    for thread in threads.values():
        thread.start()
    late = {}
    for name, thread in threads.items():
        thread.join(max(0.0, start + deadlines[name] - time.monotonic()))
        if thread.is_alive():
            late[name] = f"no answer within {deadlines[name]:g} s"
    return {name: answers[name] for name in asked if name in answers and name not in late}, errors | late


def _versions(thorough: bool) -> dict[str, str]:
    found = {"python": platform.python_version(), "lockstep": __version__}
    found |= {name: metadata.version(name) for name in ("torch", "transformers")}
    for name in NCCL_PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    if importlib.util.find_spec("ray") is not None:  # `cluster.backend: local` needs none
        found["ray"] = metadata.version("ray")
    if thorough:
        of_torch = _torch_build()
        found["torch"] = of_torch["__version__"]
        if of_torch["cuda"] is not None:
            import torch

            nccl: Any = torch.cuda.nccl
            found |= {"cuda": of_torch["cuda"], "nccl": ".".join(map(str, nccl.version()))}
    return found


def _torch_build() -> dict[str, Any]:
    """Names and values of torch's ``version.py``. Importing torch takes more than a second."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("No module named 'torch'")
    return runpy.run_path(str(Path(found.origin).parent / "version.py"))


def _gpus(seconds: float) -> tuple[Gpu, ...]:
    """GPUs by nvidia-smi, which every driver includes; empty without it."""
    if shutil.which(_NVIDIA_SMI[0]) is None:
        return ()
    done = subprocess.run(_NVIDIA_SMI, capture_output=True, text=True, timeout=seconds, check=False)
    if done.returncode:
        raise RuntimeError(f"nvidia-smi: {' '.join((done.stderr + done.stdout).split())[:300]}")
    return parse_gpus(done.stdout)


def parse_gpus(text: str) -> tuple[Gpu, ...]:
    """Reads rows of nvidia-smi: name, total MiB, free MiB, driver version. Unknown sizes are 0."""
    rows = [[value.strip() for value in line.split(",")] for line in text.splitlines() if line.strip()]
    return tuple(Gpu(name, _mebibytes(total), _mebibytes(free), driver) for name, total, free, driver in rows)


def _mebibytes(text: str) -> int:
    return int(text) << 20 if text.isdecimal() else 0


def _free_memory(root: Path) -> int:
    """MemAvailable: bytes available to processes without swapping."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", (root / "proc/meminfo").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError("no MemAvailable in /proc/meminfo")
    return int(found[1]) << 10


def _rdma(root: Path) -> tuple[Port, ...]:
    ports = sorted((root / _INFINIBAND).glob("*/ports/*"))
    return tuple(
        Port(
            f"{port.parent.parent.name}:{port.name}",
            _read(port / "state").rpartition(" ")[2],
            _read(port / "rate"),
        )
        for port in ports
    )


def _read(file: Path) -> str:
    with contextlib.suppress(OSError):
        return file.read_text().strip()
    return "unreadable"


def _limits() -> ProcessLimits:
    def soft(kind: int) -> int:
        limit = resource.getrlimit(kind)[0]
        return -1 if limit == resource.RLIM_INFINITY else limit

    return ProcessLimits(soft(resource.RLIMIT_NOFILE), soft(resource.RLIMIT_MEMLOCK))


def _disk(folder: Path) -> Disk:
    """Checks the folder, or its nearest existing ancestor."""
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    writable = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    problem = "" if writable else f"{there}: not a writable folder"
    return Disk(str(folder), shutil.disk_usage(there).free, problem)
