"""Every environment variable that Lockstep reads or sets."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from ..kernels.cpu.codegen.cache_folder import kept_folder

RUN_MARK = "LOCKSTEP_RUN"

_RAY = {
    # Sends no usage statistics.
    "RAY_USAGE_STATS_ENABLED": "0",
    # Does not copy the current folder to every node under `uv run launch`.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    # Neither hides GPUs from actors without one nor warns about it.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Keeps the environment, with the run's mark, of Ray's processes that rename themselves.
    "SPT_NOENV": "1",
    # Keeps pages of Ray's log about a lost node off the terminal; the launcher prints one line.
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",
    # Does not kill the rank that uses most memory when memory is short.
    "RAY_memory_monitor_refresh_ms": "0",
}


def prepare_ray(address: str | None = None) -> None:
    """Settings that Ray reads when it is imported; the user's take precedence.

    A cluster started here (no ``address``) gets a token of its own; Ray by default shares one in
    the home directory between clusters. To join a cluster, the user provides its token as Ray
    documents.
    """
    for name, value in _RAY.items():
        os.environ.setdefault(name, value)
    if (address or ray_address()) is not None:
        return
    # All of it is on this machine and listens on the loopback. Otherwise Ray replaces 127.0.0.1 by
    # the machine's address, and then listens on every interface.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    # The head is on this machine: without a connection it has died.
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "5")
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def ray_settings() -> dict[str, str]:
    """Settings for a Ray that a Slurm job starts."""
    return dict(_RAY)


def ray_is_guarded() -> bool:
    """Whether processes of Ray authenticate each other: by a token, or by certificates."""
    by_token = os.environ.get("RAY_AUTH_MODE", "").lower() == "token"
    return by_token or os.environ.get("RAY_USE_TLS", "").lower() in ("1", "true")


def variable(name: str) -> str | None:
    """A variable that the user names, None if it is not set."""
    return os.environ.get(name)


def ray_address() -> str | None:
    """The Ray cluster to join by RAY_ADDRESS, if any."""
    return os.environ.get("RAY_ADDRESS") or None


def mark_run(mark: str) -> None:
    """Puts this run's mark into the environment of all child processes, for the reaper."""
    os.environ[RUN_MARK] = mark


def child_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """The environment of a child process, without Ray's token."""
    own = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_TOKEN"}
    # SPT_NOENV: a process that changes its title keeps its environment, with the run's mark.
    return {**own, "PYTHONUNBUFFERED": "1", "SPT_NOENV": "1", **extra}


# Times that a thread of torch's OpenMP polls for work before it sleeps; by default it spins for
# milliseconds, which it takes from kernels' own threads and from other processes.
_SPINS = "500"


# Settings that limit numba, oneDNN, PyTorch and MKL; LLVM's x86-64-v3 is AVX2, its v4 AVX-512.
_ISA = {
    "avx2": {
        "NUMBA_CPU_NAME": "x86-64-v3",
        "NUMBA_CPU_FEATURES": "+avx2,+fma",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "avx512": {
        "NUMBA_CPU_NAME": "x86-64-v4",
        "NUMBA_CPU_FEATURES": "+avx2,+fma,+avx512f,+avx512bw,+avx512dq,+avx512vl,+avx512cd",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
    },
    "avx512_bf16": {
        "NUMBA_CPU_NAME": "x86-64-v4",
        "NUMBA_CPU_FEATURES": "+avx2,+fma,+avx512f,+avx512bw,+avx512dq,+avx512vl,+avx512cd,+avx512bf16",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16",
    },
}


def isa_settings(isa: str) -> dict[str, str]:
    """Settings that limit a process to the instructions of ``cluster.isa``.

    They must be set before the process imports the libraries that compute.
    """
    return {} if isa == "auto" else dict(_ISA[isa])


def process_settings(*, threads: int, loopback: bool, isa: str = "auto") -> dict[str, str]:
    """Settings of every process: CPU threads, their waiting, instructions, no model hub.

    ``loopback``: gloo and NCCL use only the loopback interface.
    """
    settings = {
        "OMP_NUM_THREADS": str(threads),
        "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", _SPINS),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    } | isa_settings(isa)
    if loopback:
        settings |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    return settings


def nccl_settings(deadline: float) -> dict[str, str]:
    """Settings of ranks on GPUs: NCCL's communicators are aborted by their rank, which then joins
    the others again. torch would end the process instead, and waits ``deadline`` seconds for a
    group to form.
    """
    return {
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
        "TORCH_NCCL_ENABLE_MONITORING": "0",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
        "TORCH_NCCL_NONBLOCKING_TIMEOUT": str(max(1, round(deadline))),
    }


def keep_triton_kernels() -> None:
    """Has Triton keep what it compiles in this process of a GPU in a folder that can be written,
    found as that of CPU kernels is, unless the user names one. By default it is in the home
    directory, and nothing can be compiled if that is read-only.
    """
    if not any(os.environ.get(name) for name in ("TRITON_CACHE_DIR", "TRITON_HOME")):
        os.environ["TRITON_CACHE_DIR"] = kept_folder("triton")


def tracing_settings() -> dict[str, str]:
    """The user's settings of OpenTelemetry, for frontends that another process starts."""
    return {name: value for name, value in os.environ.items() if name.startswith("OTEL_")}


def interface_settings(interface: str | None) -> dict[str, str]:
    """Tells gloo and NCCL the interface that other nodes reach, unless the user's settings do.

    By default gloo uses the one that the host name resolves to, which may be the loopback, and NCCL
    the first it finds.
    """
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    return {} if interface is None else {name: interface for name in names if name not in os.environ}


def visible_gpus() -> list[str]:
    """NVIDIA GPUs that this process may use, as named in CUDA_VISIBLE_DEVICES."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name.strip() for name in chosen.split(",") if name.strip() and name.strip() != "-1"]
    return [str(index) for index in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]
