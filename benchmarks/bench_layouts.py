"""Output tokens per second of two ranks of a thread each in every layout, beside one rank of two
threads: the same machine, checkpoint and client, in pairs.

Both servers of a pair are up and are loaded in turns, each first in every other round, when the
other one has come to rest. Client and servers share the cores. The checkpoint and the client are
those of ``bench_vllm``.

    python benchmarks/bench_layouts.py [--rounds 5] [--layouts data2 tensor2] [--at-once 8 32]
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from bench_vllm import HERE, Case, Run, measure, versions
from circumstances import commit, hardware
from make_qwen3_moe import make_checkpoint
from servers import Server, running

ALONE = "alone"
LAYOUTS = {
    "data2": ("cluster.ranks_per_node=2",),
    "data2, overlapped": ("cluster.ranks_per_node=2", "overlap=on"),
    "tensor2": ("cluster.ranks_per_node=2", "parallel.tensor=2"),
    "pipeline2": ("cluster.ranks_per_node=2", "parallel.pipeline=2"),
}
PORTS = 8103, 8104
COLUMNS = ("what", "shape", "unit", "p20", "p50", "p80", "hardware", "versions", "commit")


def command_of(model: Path, port: int, *overrides: str) -> list[str]:
    """A server of the benchmark's checkpoint on this machine."""
    fixed = (
        f"model.path={model}",
        "model.served_name=bench",
        "model.dtype=bf16",
        "model.max_len=2048",
        "cluster.backend=local",
        "cluster.device=cpu",
        "kv_cache.memory=512MiB",
        f"frontend.port={port}",
    )
    return [str(Path(sys.executable).with_name("launch")), "--recipe", "demo", *fixed, *overrides]


def pairs(
    layout: str, model: Path, cases: list[Case], rounds: int, folder: Path
) -> dict[tuple[str, str], list[Run]]:
    """Runs of a layout and of one rank, by (case, server)."""
    asked = {
        layout: (*LAYOUTS[layout], "cluster.threads=1"),
        ALONE: ("cluster.ranks_per_node=1", "cluster.threads=2"),
    }
    with contextlib.ExitStack() as stack:
        servers: list[Server] = []
        for port, (name, overrides) in zip(PORTS, asked.items(), strict=True):
            command = command_of(model, port, *overrides)
            servers.append(stack.enter_context(running(name, port, command, {}, folder)))
        return measure(servers, cases, rounds, seed=0)


def rows(layout: str, cases: list[Case], runs: dict[tuple[str, str], list[Run]]) -> Iterator[tuple[str, ...]]:
    """Quantiles of both rates, and of the ratios of pairs."""
    for case in cases:
        here, alone = (np.array([run.decode for run in runs[case.name, name]]) for name in (layout, ALONE))
        for what, unit, values in (
            (layout, "tokens/s", here),
            (f"one rank beside {layout}", "tokens/s", alone),
            (f"{layout} / one rank", "", here / alone),
        ):
            quantiles = [f"{each:.3g}" for each in np.quantile(values, (0.2, 0.5, 0.8))]
            yield what, f"decode, {case.shape}", unit, *quantiles


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layouts", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS))
    parser.add_argument("--at-once", nargs="+", type=int, default=[8, 32])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument(
        "--model", type=Path, default=Path(tempfile.gettempdir()) / "lockstep-bench-qwen3-moe"
    )
    parser.add_argument("--csv", type=Path, default=HERE / "layouts.csv")
    options = parser.parse_args()
    model = make_checkpoint(options.model)
    cases = [Case(str(number), number, options.prompt, options.output) for number in options.at_once]
    where = hardware(), versions(None), commit()
    # the servers end with this process
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    for layout in options.layouts:
        with tempfile.TemporaryDirectory() as folder:
            runs = pairs(layout, model, cases, options.rounds, Path(folder))
        with options.csv.open("a", newline="") as file:
            writer = csv.writer(file)
            if not file.tell():
                writer.writerow(COLUMNS)
            for row in rows(layout, cases, runs):
                writer.writerow([*row, *where])
                print(*row, sep="\t", flush=True)


if __name__ == "__main__":
    main()
