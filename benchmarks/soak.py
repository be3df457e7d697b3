"""Hours of mixed load with a death every other minute: nothing lost, nothing leaked.

``python benchmarks/soak.py --minutes 60`` keeps a local cluster of the demo recipe busy with
streams of random lengths, some of which their clients leave, and kills a random process every
``--every`` seconds. Before each kill the load pauses: then no page may be in use, and memory and
descriptors of every process are read. Prints what was asked, the slopes of memory and descriptors
by process, and adds a row to ``soak.csv``. Streams of a killed frontend are counted as cut. Exits 1
after a wrong token, an unexpected error, or a page that is not given back. ``--clients`` and
``--rest`` make the load small enough for a machine that others use; ``--note`` says so in the row.
"""

from __future__ import annotations

import argparse
import collections
import csv
import datetime
import math
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from chaos import ADMIN_KEY, STREAM_SECONDS, TWO_RANKS, Cluster, Stream
from circumstances import commit, hardware

ROWS = Path(__file__).with_name("soak.csv")
VICTIMS = ("rank 0", "rank 1", "controller 0", "frontend 0", "frontend 1")
KINDS = ("launcher", "controller", "rank", "frontend")
TOKENS = 120


@dataclass
class Totals:
    """Streams by how they ended, and what must not be."""

    ended: collections.Counter[str] = field(default_factory=collections.Counter)
    faults: list[str] = field(default_factory=list)
    frontend_killed: float = 0.0


@dataclass
class Samples:
    """(hours, resident MiB, descriptors) of each life: a process from its start to its death."""

    start: float = field(default_factory=time.monotonic)
    lives: dict[tuple[str, int], list[tuple[float, float, int]]] = field(default_factory=dict)

    def take(self, cluster: Cluster) -> None:
        hours = (time.monotonic() - self.start) / 3600
        for name in ("launcher", *VICTIMS):
            process = psutil.Process(cluster.pid(name))
            sample = hours, process.memory_info().rss / 2**20, process.num_fds()
            self.lives.setdefault((name, process.pid), []).append(sample)
            print(f"  {name} {process.pid}: {sample[1]:.1f} MiB, {sample[2]} descriptors", flush=True)

    def of_kind(self, kind: str) -> list[list[tuple[float, float, int]]]:
        """The samples of every life, without the first, at which a process is still warming up."""
        return [life[1:] for (name, _), life in self.lives.items() if name.split()[0] == kind]

    def slope(self, kind: str, column: int) -> float:
        """Growth an hour within lives, by least squares over all of them; NaN if all are short."""
        products = squares = 0.0
        for life in filter(None, self.of_kind(kind)):
            middle = statistics.fmean(sample[0] for sample in life)
            mean = statistics.fmean(sample[column] for sample in life)
            products += sum((sample[0] - middle) * (sample[column] - mean) for sample in life)
            squares += sum((sample[0] - middle) ** 2 for sample in life)
        return products / squares if squares else math.nan


class Load(threading.Thread):
    """One client: stream after stream, while the gate is open. It leaves some of them."""

    def __init__(
        self, url: str, known: dict[str, list[int]], gate: Gate, totals: Totals, rest: float, seed: float
    ) -> None:
        super().__init__(daemon=True)
        self._url, self._known, self._gate, self._totals = url, known, gate, totals
        self._rest, self._dice = rest, random.Random(seed)

    def run(self) -> None:
        while self._gate.enter():
            prompt = self._dice.choice(list(self._known))
            length = self._dice.randint(1, TOKENS)
            leaves = self._dice.random() < 0.25
            stream = Stream(
                self._url, prompt, length, leave_after=self._dice.randint(1, length) if leaves else 0
            )
            began = time.monotonic()
            stream.run()
            self._gate.leave()
            self._judge(stream, length, began, leaves=leaves)
            time.sleep(self._dice.uniform(0.0, 2.0 * self._rest))

    def _judge(self, stream: Stream, length: int, began: float, *, leaves: bool) -> None:
        totals, known = self._totals, self._known[stream.prompt]
        if stream.tokens != known[: len(stream.tokens)]:
            totals.faults.append(f"wrong tokens after {stream.prompt[:20]!r}")
        elif stream.error and totals.frontend_killed >= began:
            totals.ended["cut"] += 1
        elif stream.error:
            totals.faults.append(stream.error)
        elif leaves:
            totals.ended["left"] += 1
        elif len(stream.tokens) == length:
            totals.ended["whole"] += 1
        else:
            totals.faults.append(f"{len(stream.tokens)} of {length} tokens, and no error")


class Gate:
    """Lets clients begin streams while it is open, and knows how many have not ended."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._open, self._closing, self._inside = False, False, 0

    def enter(self) -> bool:
        """Waits until the gate opens. False once it is closed for good."""
        with self._changed:
            self._changed.wait_for(lambda: self._open or self._closing)
            self._inside += not self._closing
            return not self._closing

    def leave(self) -> None:
        with self._changed:
            self._inside -= 1
            self._changed.notify_all()

    def open(self) -> None:
        with self._changed:
            self._open = True
            self._changed.notify_all()

    def shut(self, *, closing: bool = False) -> None:
        """Returns when no stream is open."""
        with self._changed:
            self._open, self._closing = False, closing
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: self._inside == 0, 2 * STREAM_SECONDS):
                raise SystemExit(f"{self._inside} streams do not end")


def assert_idle(cluster: Cluster, totals: Totals) -> None:
    """Every page comes back within a few seconds of the last stream's end."""
    for _ in range(100):
        state = cluster.state()
        used = state["num_running"], [rank["pages_used"] for rank in state["ranks"]]
        if used == (0, [0] * len(used[1])):
            return
        time.sleep(0.1)
    totals.faults.append(f"running and pages in use without any stream: {used}")


def soak(cluster: Cluster, chosen: argparse.Namespace) -> tuple[Totals, Samples, collections.Counter[str]]:
    dice = random.Random(chosen.seed)
    known: dict[str, list[int]] = {}
    for number in range(24):
        prompt = f"{number}: " + "".join(dice.choices("abcdefgh ", k=dice.randint(5, 400)))
        alone = Stream(cluster.url, prompt, TOKENS)
        alone.run()
        assert len(alone.tokens) == TOKENS, alone.error
        known[prompt] = alone.tokens
    totals, samples, gate = Totals(), Samples(), Gate()
    kills: collections.Counter[str] = collections.Counter()
    clients = [
        Load(cluster.url, known, gate, totals, chosen.rest, dice.random()) for _ in range(chosen.clients)
    ]
    for client in clients:
        client.start()
    end = time.monotonic() + 60.0 * chosen.minutes
    while time.monotonic() < end and not totals.faults:
        gate.open()
        time.sleep(chosen.every * dice.uniform(0.8, 1.0))
        victim = dice.choice(VICTIMS)
        if victim.startswith("frontend"):
            totals.frontend_killed = time.monotonic() + 1.0
        psutil.Process(cluster.pid(victim)).kill()
        kills[victim] += 1
        cluster.settle()
        time.sleep(chosen.every * 0.2)
        gate.shut()
        cluster.settle()
        assert_idle(cluster, totals)
        samples.take(cluster)
        print(f"{sum(kills.values())} kills, {dict(totals.ended)}, {len(totals.faults)} faults", flush=True)
    gate.shut(closing=True)
    return totals, samples, kills


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--every", type=float, default=120.0, help="seconds between two kills")
    parser.add_argument("--clients", type=int, default=8, help="streams at once")
    parser.add_argument("--rest", type=float, default=0.0, help="mean seconds between a client's streams")
    parser.add_argument("--note", default="", help="circumstances of the run, for its row")
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # or the cluster would outlive this process
    arguments = ["cluster.backend=local", "frontend.port=0", f"frontend.admin_key={ADMIN_KEY}", *TWO_RANKS]
    with tempfile.TemporaryDirectory() as folder:
        cluster = Cluster(Path(folder), arguments)
        try:
            totals, samples, kills = soak(cluster, chosen)
            if totals.faults:
                print((Path(folder) / "launch.log").read_text())
        finally:
            cluster.close()
    for fault in totals.faults[:10]:
        print("fault:", fault)
    slopes = {kind: (samples.slope(kind, 1), samples.slope(kind, 2)) for kind in KINDS}
    for kind, (memory, descriptors) in slopes.items():
        every = [sample for life in samples.of_kind(kind) for sample in life]
        most = [max((sample[column] for sample in every), default=math.nan) for column in (1, 2)]
        print(
            f"{kind}: at most {most[0]:.0f} MiB, {memory:+.1f} an hour; {most[1]} descriptors, "
            f"{descriptors:+.1f} an hour"
        )
    row = {
        "minutes": chosen.minutes,
        "kills": sum(kills.values()),
        **{f"streams_{how}": totals.ended[how] for how in ("whole", "left", "cut")},
        "faults": len(totals.faults),
        **{f"{kind}_mib_per_hour": f"{slope:+.1f}" for kind, (slope, _) in slopes.items()},
        **{f"{kind}_fds_per_hour": f"{slope:+.1f}" for kind, (_, slope) in slopes.items()},
        "clients": chosen.clients,
        "load": f"{os.getloadavg()[2]:.1f}",
        "note": chosen.note,
        "seed": chosen.seed,
        "hardware": hardware(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).date(),
    }
    new = not ROWS.exists()
    with ROWS.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)
    return int(bool(totals.faults))


if __name__ == "__main__":
    sys.exit(main())
