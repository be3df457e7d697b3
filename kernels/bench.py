"""Times of the ops against their rooflines: ``python -m lockstep.kernels.bench``.

Writes ``kernels_gpu.csv`` on a machine with an NVIDIA card and ``kernels_cpu.csv`` on one without, a row for every case and
implementation. A machine without a card writes the list of the GPU's rows, "not measured", where there is no such file yet.
Ceilings are measured in the same run: the bandwidth of a copy and the rate of a large matrix product.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from .bench_cases import Call, Case, cases
from .table import Ops, ops_of

NOT_MEASURED = "not measured"
FOLDER = Path(__file__).parent.parent / "benchmarks"

_FLUSHED_BYTES = 256 << 20  # more than any card's L2 cache
_SECONDS_PER_CASE = 0.5


@dataclass(frozen=True)
class Row:
    """Times in microseconds. ``roofline_us``: what the ceilings allow; ``bound``: which one; ``share``: roofline / p50."""

    op: str
    shape: str
    implementation: str
    p20_us: str
    p50_us: str
    p80_us: str
    roofline_us: str
    bound: str
    share: str
    copy_gb_s: str
    matmul_tflop_s: str
    hardware: str
    torch: str
    triton: str
    commit: str


@dataclass(frozen=True)
class Ceilings:
    """bytes_per_s of a copy (read and written), flops of a product in bf16; FP8 doubles it."""

    bytes_per_s: float
    flops: float

    def bound(self, call: Call) -> tuple[float, str]:
        """The least time in microseconds, and what sets it."""
        memory, compute = call.num_bytes / self.bytes_per_s, call.flops / (self.flops * (2 if call.fp8 else 1))
        return max(memory, compute) * 1e6, "memory" if memory >= compute else "compute"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lockstep.kernels.bench", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the CSV files")
    parser.add_argument("--only", default="", help="cases whose op or shape contains this")
    arguments = parser.parse_args()
    chosen = [case for case in cases() if arguments.only in case.op or arguments.only in case.shape]
    if torch.cuda.is_available():
        device = torch.device("cuda")
        implementations = [ops_of("triton"), ops_of("reference")]
        _write(arguments.out / "kernels_gpu.csv", _measured(chosen, device, implementations))
    else:
        small = [case for case in chosen if case.small]
        _write(arguments.out / "kernels_cpu.csv", _measured(small, torch.device("cpu"), [ops_of("cpu")]))
        if not (arguments.out / "kernels_gpu.csv").exists():
            _write(arguments.out / "kernels_gpu.csv", _unmeasured(chosen))


def _measured(chosen: list[Case], device: torch.device, implementations: list[Ops]) -> Iterator[Row]:
    ceilings = measure_ceilings(device)
    blank = _blank(device, ceilings)
    for case in chosen:
        try:
            call = case.make(device)
        except (MemoryError, torch.OutOfMemoryError) as error:
            yield replace(blank, op=case.op, shape=case.shape, implementation="all", p50_us=f"{NOT_MEASURED}: {error}".split("\n")[0])
            continue
        runs: dict[str, Callable[[], object]] = {ops.column: _bind(call, ops) for ops in implementations if _runs(case, ops, device)}
        roofline, bound = ceilings.bound(call)
        for name, run in (runs | call.rivals).items():
            p20, p50, p80 = time_of(run, device)
            yield replace(
                blank,
                op=case.op,
                shape=case.shape,
                implementation=name,
                p20_us=f"{p20:.1f}",
                p50_us=f"{p50:.1f}",
                p80_us=f"{p80:.1f}",
                roofline_us=f"{roofline:.1f}",
                bound=bound,
                share=f"{roofline / p50:.2f}",
            )


def _runs(case: Case, ops: Ops, device: torch.device) -> bool:
    """The references of experts are loops over pairs: not for a clock."""
    return not (device.type == "cuda" and ops.column == "reference" and case.op.startswith("experts"))


def _bind(call: Call, ops: Ops) -> Callable[[], object]:
    return lambda: call.run(ops)


def time_of(run: Callable[[], object], device: torch.device) -> tuple[float, float, float]:
    """p20, p50 and p80 in microseconds; on a card with a cold L2 cache, as a captured graph where the op can be captured."""
    for _ in range(3):
        run()
    samples = _cuda_samples(run, device) if device.type == "cuda" else _cpu_samples(run)
    cuts = statistics.quantiles(samples, n=10) if len(samples) > 1 else samples * 9
    return cuts[1], statistics.median(samples), cuts[7]


def _cpu_samples(run: Callable[[], object]) -> list[float]:
    samples: list[float] = []
    end = time.perf_counter() + _SECONDS_PER_CASE
    while len(samples) < 5 or (time.perf_counter() < end and len(samples) < 200):
        start = time.perf_counter()
        run()
        samples.append((time.perf_counter() - start) * 1e6)
    return samples


def _cuda_samples(run: Callable[[], object], device: torch.device) -> list[float]:
    graph = torch.cuda.CUDAGraph()
    replay: Callable[[], object] = graph.replay
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:  # an op that reads the device from the host cannot be captured; it is timed as it is called
        torch.cuda.synchronize()
        replay = run
    flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.uint8, device=device)
    events = []
    for _ in range(51):
        flushed.zero_()
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        replay()
        stop.record()
        events.append((start, stop))
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) * 1e3 for start, stop in events[1:]]


def measure_ceilings(device: torch.device) -> Ceilings:
    """A copy far larger than caches and a square product in bf16."""
    size, side = (1 << 30, 8192) if device.type == "cuda" else (1 << 27, 1024)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a = torch.randn(side, side, device=device).to(torch.bfloat16)
    copy, product = time_of(lambda: target.copy_(source), device)[1], time_of(lambda: a @ a, device)[1]
    return Ceilings(2 * size / copy * 1e6, 2 * side**3 / product * 1e6)


def _unmeasured(chosen: list[Case]) -> Iterator[Row]:
    blank = replace(_blank(None, None), **dict.fromkeys(("p20_us", "p50_us", "p80_us"), NOT_MEASURED))
    for case in chosen:
        yield replace(blank, op=case.op, shape=case.shape, implementation="triton")


def _blank(device: torch.device | None, ceilings: Ceilings | None) -> Row:
    hardware = NOT_MEASURED
    if device is not None:
        hardware = torch.cuda.get_device_name() if device.type == "cuda" else f"{_cpu_name()}, {torch.get_num_threads()} threads"
    empty = dict.fromkeys((name for name in Row.__dataclass_fields__), "")
    return Row(
        **empty
        | {
            "copy_gb_s": f"{ceilings.bytes_per_s / 1e9:.1f}" if ceilings else NOT_MEASURED,
            "matmul_tflop_s": f"{ceilings.flops / 1e12:.2f}" if ceilings else NOT_MEASURED,
            "hardware": hardware,
            "torch": torch.__version__,
            "triton": _version("triton"),
            "commit": _commit(),
        }
    )


def _cpu_name() -> str:
    names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _commit() -> str:
    """Of the checkout, marked where it has changes."""
    command = ["git", "-C", str(FOLDER.parent), "describe", "--always", "--dirty"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    return result.stdout.strip() or "unknown"


def _write(path: Path, rows: Iterator[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(Row.__dataclass_fields__), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow(asdict(row))
            file.flush()
            print(f"{row.op:18} {row.shape:48} {row.implementation:18} {row.p50_us:>14} us  {row.share:>5} of {row.bound or 'roofline'}")


if __name__ == "__main__":
    main()
