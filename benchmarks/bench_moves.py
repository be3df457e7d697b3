"""Moves of experts under traffic whose families shift, on the demo.

``python benchmarks/bench_moves.py --ranks 4`` starts a local cluster, sends one family of questions
after another, and watches ``/admin/cluster``. For every family it prints the imbalance (maximum /
mean load over ranks, averaged over layers) of the first reports, of the last ones, and that of the
solver's answer to the same loads, and the steps until moves were committed; then times between
a stream's chunks while moves were under way, and otherwise. Adds rows to ``moves.csv``.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import itertools
import json
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from chaos import Cluster
from circumstances import commit, hardware

from lockstep.moe.balance.balance import Limits, balance, weighted_imbalance
from lockstep.moe.balance.placement import Placement, contiguous
from lockstep.recipes.demo.training.batches import held_out_cases

ADMIN = "bench-moves"
ROWS = Path(__file__).with_name("moves.csv")


class Traffic:
    """Streams that ask the questions of one family, again and again; gaps as (time, seconds)."""

    def __init__(self, url: str, num_streams: int) -> None:
        self.url, self.questions, self.stopped = url, [""], False
        self.gaps: list[tuple[float, float]] = []
        self.threads = [
            threading.Thread(target=self._run, args=(number,), daemon=True) for number in range(num_streams)
        ]

    def _run(self, number: int) -> None:
        with httpx.Client(timeout=120.0) as client:
            for turn in itertools.count(number * 7):
                if self.stopped:
                    return
                question = self.questions[turn % len(self.questions)]
                body = {"messages": [{"role": "user", "content": question}], "max_tokens": 64, "stream": True}
                last = 0.0
                with client.stream("POST", f"{self.url}/chat/completions", json=body) as answer:
                    for line in answer.iter_lines():
                        if line.startswith("data: {"):
                            now = time.monotonic()
                            if last:
                                self.gaps.append((now, now - last))
                            last = now


def families() -> dict[str, list[str]]:
    """Questions by family, those that are one message."""
    return {
        family: [str(case.messages[0]["content"]) for case in cases if len(case.messages) == 1]
        for family, cases in held_out_cases(200).items()
        if sum(len(case.messages) == 1 for case in cases) >= 40
    }


def placement_of(state: dict[str, Any], num_experts: int, num_ranks: int) -> Placement:
    """The placement that a state tells by ranges."""
    experts = [
        [[expert for low, high in ranges for expert in range(low, high + 1)] for ranges in span["experts"]]
        for span in state["placement"]
        for _ in range(span["layers"][0], span["layers"][1] + 1)
    ]
    most = max(len(held) for ranks in experts for held in ranks)
    padded = [[held + [-1] * (most - len(held)) for held in ranks] for ranks in experts]
    return Placement(np.array(padded, np.int32), num_experts)


def watch(
    cluster: Cluster, seconds: float, num_ranks: int
) -> tuple[dict[str, Any], list[tuple[float, float]]]:
    """Watches one family. Returns its figures, and the spans of time in which moves were under
    way.
    """
    base = cluster.url.removesuffix("/v1")
    loads: list[np.ndarray[Any, Any]] = []
    imbalances: list[float] = []
    spans: list[tuple[float, float]] = []
    first_step, version = -1, -1
    commits: list[int] = []  # steps
    end = time.monotonic() + seconds
    state: dict[str, Any] = {}
    while time.monotonic() < end:
        time.sleep(0.1)
        before = time.monotonic()
        state = httpx.get(f"{base}/admin/cluster", headers={"Authorization": f"Bearer {ADMIN}"}).json()
        if state["moves_open"]:
            spans.append((before - 0.5, before + 0.5))  # states are told twice a second
        if first_step < 0:
            first_step, version = state["step"], state["placement_version"]
        if state["placement_version"] > version:
            version = state["placement_version"]
            commits.append(state["step"] - first_step)
        counts = np.array(state["expert_load"], np.float64)
        if state["step"] - first_step > 64 and (not loads or (counts != loads[-1]).any()):
            loads.append(counts)
            imbalances.append(weighted_imbalance(counts, placement_of(state, counts.shape[1], num_ranks)))
    recent = np.sum(loads[-4:], axis=0)
    start = contiguous(recent.shape[0], recent.shape[1], num_ranks)
    solved = weighted_imbalance(recent, balance(recent, start, Limits(target=1.0)).placement)
    reached = weighted_imbalance(recent, placement_of(state, recent.shape[1], num_ranks))
    figures = {
        "imbalance_at_first": f"{np.mean(imbalances[:2]):.3f}",
        "imbalance_at_last": f"{reached:.3f}",
        "imbalance_solved": f"{solved:.3f}",
        "steps_to_first_commit": commits[0] if commits else "",
        "steps_to_last_commit": commits[-1] if commits else "",
        "assignments": int(recent.sum() / recent.shape[0]),
    }
    return figures, spans


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--streams", type=int, default=24)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each family")
    parser.add_argument("--families", type=int, default=4)
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    arguments = [
        "cluster.backend=local",
        "frontend.port=0",
        f"frontend.admin_key={ADMIN}",
        f"cluster.ranks_per_node={chosen.ranks}",
        f"cluster.threads={max(1, (os.cpu_count() or 1) // chosen.ranks)}",
        "kv_cache.memory=64MiB",
    ]
    rows: list[dict[str, Any]] = []
    spans: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        cluster = Cluster(Path(folder), arguments)
        try:
            traffic = Traffic(cluster.url, chosen.streams)
            for number, (family, questions) in enumerate(list(families().items())[: chosen.families]):
                traffic.questions = questions
                if not number:
                    for thread in traffic.threads:
                        thread.start()
                figures, moving = watch(cluster, chosen.seconds, chosen.ranks)
                spans += moving
                rows.append({"family": family, "ranks": chosen.ranks, **figures})
                print(json.dumps(rows[-1]), flush=True)
            traffic.stopped = True
            for thread in traffic.threads:
                thread.join(60.0)
        finally:
            cluster.close()
    during = [gap for at, gap in traffic.gaps if any(low <= at <= high for low, high in spans)]
    otherwise = [gap for at, gap in traffic.gaps if not any(low <= at <= high for low, high in spans)]
    gaps = {
        "gap_p99_ms_moving": f"{1000 * np.quantile(during, 0.99):.1f}" if during else "",
        "gap_p99_ms_otherwise": f"{1000 * np.quantile(otherwise, 0.99):.1f}",
        "gap_p50_ms_moving": f"{1000 * np.quantile(during, 0.5):.1f}" if during else "",
        "gap_p50_ms_otherwise": f"{1000 * np.quantile(otherwise, 0.5):.1f}",
    }
    print(json.dumps(gaps | {"gaps": len(traffic.gaps), "while_moving": len(during)}))
    facts = {"hardware": hardware(), "commit": commit(), "date": datetime.datetime.now(datetime.UTC).date()}
    new = not ROWS.exists()
    with ROWS.open("a", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *gaps, *facts])
        if new:
            writer.writeheader()
        writer.writerows(row | gaps | facts for row in rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
