"""Measures an exchange between ranks of one host over gloo and through shared memory, in pairs:
wall time, CPU time of a rank, and times that its threads gave up the core.

    python benchmarks/bench_exchange.py [--rounds 10]

Each rank has a thread. Rows are those of a decode step's tokens on their way to experts: 784 bytes
for the demo model (192 wide, fp32), 2,080 for the Qwen3-MoE of ``bench_vllm`` (1,024 wide, bf16).
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import platform
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from circumstances import commit, hardware
from torch.distributed import TCPStore

from lockstep.parallel.collectives import Collectives

OUTPUT = Path(__file__).parent / "exchange.csv"
CALLS = 100
"""Exchanges in a row."""
WAYS = {"gloo": False, "memory": True}
SHAPES = [(ranks, rows, width) for ranks in (2, 4) for width in (784, 2080) for rows in (1, 8, 32)]


def run(collectives: Collectives, rows: torch.Tensor) -> tuple[float, float, float]:
    """Microseconds, microseconds of CPU and switches of an exchange, the mean of ``CALLS``."""
    collectives.wait(collectives.all_reduce(torch.zeros(1), "all ranks"))
    wall, busy = time.perf_counter(), time.process_time()
    switches = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw
    for _ in range(CALLS):
        collectives.wait(collectives.all_to_all(rows, None, None, "rows"))
    ended = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw
    seconds = time.perf_counter() - wall, time.process_time() - busy
    return 1e6 * seconds[0] / CALLS, 1e6 * seconds[1] / CALLS, (ended - switches) / CALLS


def rank_process(index: int, size: int, port: int, rounds: int, out: Any) -> None:
    """Measures both ways in turn; the first rank puts (way, rows, width), and its figures."""
    torch.set_num_threads(1)
    store = TCPStore("127.0.0.1", port, is_master=False)
    groups = {
        way: Collectives(way, index, size, store, 60.0, torch.device("cpu"), memory)
        for way, memory in WAYS.items()
    }
    for group in groups.values():
        group.build(0)
    for _, num_rows, width in (shape for shape in SHAPES if shape[0] == size):
        rows = torch.zeros(size * num_rows, width, dtype=torch.uint8)
        found: dict[str, list[tuple[float, float, float]]] = {way: [] for way in WAYS}
        for number in range(rounds):
            for way in list(WAYS)[:: 1 if number % 2 else -1]:
                found[way].append(run(groups[way], rows))
        if index == 0:
            out.put((size, num_rows, width, found))
    for group in groups.values():
        group.wait(group.all_reduce(torch.zeros(1), "the end"))
        group.destroy()


def rows_of(size: int, num_rows: int, width: int, found: dict[str, list[tuple[float, float, float]]]) -> Any:
    """Rows of a shape, and the ratios of its pairs."""
    shape = f"ranks={size} rows={num_rows} bytes={width}"
    for way, figures in found.items():
        for name, unit, values in zip(
            ("wall", "CPU", "switches"), ("us", "us", ""), np.array(figures).T, strict=True
        ):
            yield (
                f"{way}, {name}",
                shape,
                unit,
                *(f"{each:.1f}" for each in np.quantile(values, (0.2, 0.5, 0.8))),
            )
    ratios = np.array(found["memory"])[:, 0] / np.array(found["gloo"])[:, 0]
    yield "memory / gloo, wall", shape, "", *(f"{each:.3f}" for each in np.quantile(ratios, (0.2, 0.5, 0.8)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    where = hardware(), f"python {platform.python_version()} torch {torch.__version__}", commit()
    context = multiprocessing.get_context("spawn")
    for size in (2, 4):
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        out: Any = context.Queue()
        ranks = [
            context.Process(
                target=rank_process, args=(index, size, store.port, arguments.rounds, out), daemon=True
            )
            for index in range(size)
        ]
        for rank in ranks:
            rank.start()
        for _ in range(len(SHAPES) // 2):
            with OUTPUT.open("a", newline="") as file:
                writer = csv.writer(file)
                if not file.tell():
                    writer.writerow(
                        ["what", "shape", "unit", "p20", "p50", "p80", "hardware", "versions", "commit"]
                    )
                for row in rows_of(*out.get(timeout=600)):
                    writer.writerow([*row, *where])
                    print(*row, sep="\t", flush=True)
        for rank in ranks:
            rank.join(60)
    os._exit(0)  # the stores' threads do not end by themselves


if __name__ == "__main__":
    main()
