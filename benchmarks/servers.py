"""Lockstep and vLLM as servers of a benchmark: started, watched and stopped."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lockstep.launch.environment import isa_settings

START_SECONDS = 300
IDLE_SECONDS = 10
VLLM_PORT, LOCKSTEP_PORT = 8101, 8102


@dataclass
class Server:
    """``pids`` are its processes, for their CPU time; empty if it was not started here."""

    name: str
    port: int
    pids: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Cpu:
    """The threads of a server, and the instructions it may use, as ``cluster.isa``."""

    threads: int
    isa: str


def lockstep(folder: Path, model: Path, ranks: int, cpu: Cpu) -> tuple[list[str], dict[str, str]]:
    recipe = folder / "bench.yaml"
    recipe.write_text(
        f"model: {{path: {model}, served_name: bench}}\n"
        "cluster: {backend: local, device: cpu, "
        f"ranks_per_node: {ranks}, threads: {cpu.threads}, isa: {cpu.isa}}}\n"
        "kv_cache: {memory: 2GiB}\n"
        f"frontend: {{port: {LOCKSTEP_PORT}}}\n"
    )
    return [str(Path(sys.executable).with_name("launch")), "--recipe", str(recipe)], {}


_LACKS = {
    "avx2": ("avx512", "avx512_bf16", "avx512_vnni", "amx_tile"),
    "avx512": ("avx512_bf16", "avx512_vnni", "amx_tile"),
    "avx512_bf16": ("amx_tile",),
}

# vLLM asks torch which of its kernels the CPU can run. Its processes import this file too.
_LESSER_CPU = """
import sys
import torch
for name in {names}:
    setattr(torch.cpu, f"_is_{{name}}_supported", lambda: False)
from vllm.entrypoints.cli.main import main
if __name__ == "__main__":
    sys.exit(main())
"""


def vllm(folder: Path, venv: Path, model: Path, cpu: Cpu) -> tuple[list[str], dict[str, str]]:
    """The settings that vLLM's documentation advises for CPUs: Intel's OpenMP preloaded, a thread
    bound to each core.
    """
    start = [str(venv / "bin" / "vllm")]
    if cpu.isa != "auto":
        program = folder / "vllm_on_a_lesser_cpu.py"
        program.write_text(_LESSER_CPU.format(names=_LACKS[cpu.isa]))
        start = [str(venv / "bin" / "python"), str(program)]
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{cpu.threads - 1}",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "LD_PRELOAD": str(next(venv.glob("lib/libiomp5.so"))),
    } | isa_settings(cpu.isa)
    options = "--served-model-name bench --dtype bfloat16 --max-model-len 8192 --disable-log-stats"
    return [*start, "serve", str(model), *options.split(), "--port", str(VLLM_PORT)], settings


@contextlib.contextmanager
def running(
    name: str, port: int, command: list[str], settings: dict[str, str], folder: Path
) -> Iterator[Server]:
    """Starts a server in its own session and stops it again."""
    log = folder / f"{name}.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            command, env=os.environ | settings, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not healthy(port):
            said = log.read_text()[-3000:]
            assert process.poll() is None, f"{name} ended with {process.returncode}:\n{said}"
            assert time.monotonic() < deadline, f"{name} was not up within {START_SECONDS} s:\n{said}"
            time.sleep(0.5)
        yield Server(name, port, descendants(process.pid))
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def healthy(port: int) -> bool:
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False


def descendants(pid: int) -> list[int]:
    """A process and all descendants of it, in any session."""
    found = [pid]
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            for child in (thread / "children").read_text().split():
                found += descendants(int(child))
    return found


def wait_until_idle(pids: list[int]) -> None:
    """Returns when the processes use next to no CPU. A server's threads may keep spinning for a
    while after its last request.
    """
    deadline = time.monotonic() + IDLE_SECONDS
    while time.monotonic() < deadline:
        before = cpu_seconds(pids)
        time.sleep(0.25)
        if cpu_seconds(pids) - before < 0.01:
            return
    print(f"the idle server still used CPU after {IDLE_SECONDS} s", flush=True)


def cpu_seconds(pids: list[int]) -> float:
    """CPU time of processes with all their threads. Processes that have ended count nothing."""
    total = 0.0
    for pid in pids:
        with contextlib.suppress(OSError):
            total += time.clock_gettime((~pid << 3) | 2)
    return total
