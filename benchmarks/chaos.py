"""Processes that die or stand still under streams: no token may be lost or differ.

``python benchmarks/chaos.py --seed 1`` starts local clusters of the demo recipe: two ranks, then
four with a replica of every expert. Case after case it opens streams, lets a process die (SIGKILL)
or stand still (SIGSTOP) at a moment that the seed decides, and compares every stream with its
tokens from before. Prints a table and adds rows to ``chaos.csv``. A frontend takes its own streams
with it: these are counted as cut. Exits 1 when a stream is lost or differs.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from circumstances import commit, hardware

START_SECONDS = 300.0
STREAM_SECONDS = 180.0
ADMIN_KEY = "chaos"
TWO_RANKS = ["frontend.processes=2", "kv_cache.memory=64MiB"]
FOUR_RANKS = [
    "cluster.ranks_per_node=4",
    "cluster.threads=1",
    "kv_cache.memory=64MiB",
    "experts.redundant=32",
]
ROWS = Path(__file__).with_name("chaos.csv")


@dataclass(frozen=True)
class Case:
    """``victims`` by role and index, or the fork server. ``seconds`` to stand still; 0: they are
    killed. ``burst``: as the streams are submitted, else once all flow; ``moving``: once experts
    move. ``held``: their replacements stand still until the streams have ended, so that survivors
    go on alone.
    """

    name: str
    victims: tuple[str, ...]
    seconds: float = 0.0
    burst: bool = False
    cuts: bool = False
    moving: bool = False
    held: bool = False


def schedule(stop_seconds: float) -> list[Case]:
    """Each kind of process killed and stopped, two ranks at once, the controller in a burst."""
    kinds = ["rank 1", "controller 0", "frontend 1"]
    kills = [Case(f"kill {kind}", (kind,), cuts=kind.startswith("frontend")) for kind in kinds]
    several = [
        Case("kill both ranks", ("rank 0", "rank 1")),
        Case("kill the fork server of both ranks", ("fork server",)),
        Case("kill controller 0 during admissions", ("controller 0",), burst=True),
        Case("kill controller 0 and rank 1", ("controller 0", "rank 1")),
    ]
    stops = [
        Case(f"stop {kind} for {stop_seconds:g} s", (kind,), stop_seconds) for kind in [*kinds, "launcher"]
    ]
    return kills + several + stops


def schedule_of_four() -> list[Case]:
    """Deaths that survivors outlive without a replacement, and one while experts move."""
    return [
        Case("kill rank 3 of 4", ("rank 3",), held=True),
        Case("kill ranks 1 and 3 of 4", ("rank 1", "rank 3"), held=True),
        Case("kill rank 1 of 4 while experts move", ("rank 1",), moving=True),
    ]


@dataclass
class Stream(threading.Thread):
    """Reads one greedy answer; ``tokens`` so far, the longest ``gap`` between two chunks. It leaves
    after ``leave_after`` tokens; 0: never.
    """

    url: str
    prompt: str
    max_tokens: int
    leave_after: int = 0
    tokens: list[int] = field(default_factory=list)
    gap: float = 0.0
    error: str = ""
    first: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        super().__init__(daemon=True)

    def __hash__(self) -> int:
        return id(self)

    def run(self) -> None:
        body = {
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        last = time.monotonic()
        try:
            with (
                httpx.Client(timeout=STREAM_SECONDS) as client,
                client.stream("POST", f"{self.url}/completions", json=body) as answer,
            ):
                for line in answer.iter_lines():
                    if not line.startswith("data: {"):
                        continue
                    chunk = json.loads(line[6:])
                    now = time.monotonic()
                    self.gap, last = max(self.gap, now - last), now
                    if "error" in chunk:
                        self.error = chunk["error"]["message"]
                        return
                    for choice in chunk["choices"]:
                        self.tokens += choice.get("token_ids") or []
                    self.first.set()
                    if 0 < self.leave_after <= len(self.tokens):
                        return
        except (httpx.HTTPError, OSError) as error:
            self.error = f"{type(error).__name__}: {error}"
        finally:
            self.first.set()


class Cluster:
    """A launch command and its processes by role and index."""

    def __init__(self, folder: Path, arguments: list[str]) -> None:
        self._log = folder / "launch.log"
        command = [str(Path(sys.executable).with_name("launch")), "--recipe", "demo", *arguments]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        end = time.monotonic() + START_SECONDS
        while not (found := re.search(r"^ready: (\S+) serves", self._log.read_text(), re.MULTILINE)):
            if self.process.poll() is not None or time.monotonic() > end:
                self.close()
                raise SystemExit(f"the cluster did not start:\n{self._log.read_text()}")
            time.sleep(0.1)
        self.url = found[1]

    def pid(self, name: str) -> int:
        if name == "launcher":
            return self.process.pid
        if name == "fork server":
            return psutil.Process(self.pid("rank 0")).ppid()
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if " ".join(child.cmdline()).split()[-3:-1] == name.split():  # one string in a fork
                    return child.pid
            except psutil.Error:  # it has just ended
                continue
        raise SystemExit(f"no process {name}:\n{self._log.read_text()}")

    def state(self) -> dict[str, Any]:
        """The state of the cluster, as ``/admin/cluster`` shows it."""
        headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
        answer = httpx.get(self.url.removesuffix("/v1") + "/admin/cluster", headers=headers, timeout=5.0)
        return dict(answer.json())

    def stop_successors(self, victims: dict[str, int]) -> list[int]:
        """Stops the processes that take the places of victims, each as soon as it is seen."""
        end, stopped = time.monotonic() + START_SECONDS, list[int]()
        while victims and time.monotonic() < end:
            for name, pid in list(victims.items()):
                with contextlib.suppress(SystemExit):
                    if (found := self.pid(name)) != pid:
                        os.kill(found, signal.SIGSTOP)
                        stopped.append(found)
                        del victims[name]
        if victims:
            raise SystemExit(f"no process {', '.join(victims)}:\n{self._log.read_text()}")
        return stopped

    def settle(self) -> None:
        """Returns when all processes are there and requests are taken."""
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            try:
                health = httpx.get(self.url.removesuffix("/v1") + "/health", timeout=5.0)
                if health.status_code == 200 and "degraded" not in health.json():
                    return
            except (httpx.HTTPError, ValueError):
                pass
            time.sleep(0.2)
        raise SystemExit(f"the cluster does not come back:\n{self._log.read_text()}")

    def close(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(60.0)
        except subprocess.TimeoutExpired:
            self.process.kill()


def strike(cluster: Cluster, case: Case) -> list[int]:
    """Returns the replacements that stand still."""
    pids = [cluster.pid(name) for name in case.victims]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP if case.seconds else signal.SIGKILL)
    if case.seconds:
        time.sleep(case.seconds)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):  # it was replaced meanwhile
                os.kill(pid, signal.SIGCONT)
    if not case.held:
        return []
    return cluster.stop_successors(dict(zip(case.victims, pids, strict=True)))


def open_streams(cluster: Cluster, prompts: Iterable[str], length: int) -> list[Stream]:
    streams = [Stream(cluster.url, prompt, length) for prompt in prompts]
    for stream in streams:
        stream.start()
    return streams


def open_until_experts_move(cluster: Cluster, prompts: Iterable[str], length: int) -> list[Stream]:
    """Opens rounds of streams. Returns the round in which experts move."""
    end = time.monotonic() + STREAM_SECONDS
    while time.monotonic() < end:
        streams = open_streams(cluster, prompts, length)
        while any(stream.is_alive() for stream in streams):
            if cluster.state()["moves_open"]:
                return streams
            time.sleep(0.02)
    raise SystemExit(f"no expert has moved within {STREAM_SECONDS:g} s")


def run(
    cluster: Cluster, case: Case, stored: dict[str, list[int]], chance: random.Random
) -> dict[str, object]:
    """One case under a stream for each of the ``stored`` prompts. Returns its row."""
    length = len(next(iter(stored.values())))
    if case.moving:
        streams = open_until_experts_move(cluster, stored, length)
    else:
        streams = open_streams(cluster, stored, length)
        for stream in streams if not case.burst else ():
            stream.first.wait(STREAM_SECONDS)
        time.sleep(chance.uniform(0.0, 0.1 if case.burst else 0.5))
    held = strike(cluster, case)
    for stream in streams:
        stream.join(STREAM_SECONDS)
    if held and not all(psutil.pid_exists(pid) for pid in held):
        raise SystemExit(f"{case.name}: a replacement had joined before it could be stopped; run it again")
    for pid in held:
        os.kill(pid, signal.SIGCONT)
    cut = [stream for stream in streams if stream.error and case.cuts]
    lost = [stream for stream in streams if stream not in cut and len(stream.tokens) < length]
    differ = sum(stream.tokens != stored[stream.prompt][: len(stream.tokens)] for stream in streams)
    for stream in lost[:3]:
        print(f"  lost after {len(stream.tokens)} tokens: {stream.error or 'it does not end'}")
    kept = [stream.gap for stream in streams if stream not in cut]
    cluster.settle()
    return {
        "case": case.name,
        "streams": len(streams),
        "lost": len(lost),
        "differ": differ,
        "cut": len(cut),
        "longest_gap_s": f"{max(kept, default=0.0):.2f}",
        "median_gap_s": f"{sorted(kept)[len(kept) // 2] if kept else 0.0:.2f}",
    }


def run_cases(
    cases: list[Case], sizes: list[str], chosen: argparse.Namespace, chance: random.Random, end: float
) -> Iterator[dict[str, object]]:
    """Yields the rows of cases on one cluster, one after another, while they begin before
    ``end``.
    """
    settings = f"cluster.backend={chosen.backend}", "frontend.port=0", f"frontend.admin_key={ADMIN_KEY}"
    with tempfile.TemporaryDirectory() as folder:
        cluster = Cluster(Path(folder), [*settings, *sizes])
        try:
            stored: dict[str, list[int]] = {}
            for number in range(chosen.streams):
                prompt = f"{number}: " + "".join(chance.choices("abcdefgh ", k=chance.randint(5, 200)))
                alone = Stream(cluster.url, prompt, chosen.tokens)
                alone.run()
                assert len(alone.tokens) == chosen.tokens, alone.error
                stored[prompt] = alone.tokens
            for case in cases:
                if time.monotonic() < end:
                    row = run(cluster, case, stored, chance)
                    print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
                    yield row
        finally:
            cluster.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", choices=("local", "ray"), default="local")
    parser.add_argument("--streams", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=120)
    parser.add_argument("--stop", type=float, default=5.0, help="seconds of a standstill")
    parser.add_argument("--only", default="", help="cases whose names contain this")
    parser.add_argument("--minutes", type=float, default=60.0, help="no case begins after so many")
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # or the cluster would outlive this process
    chance = random.Random(chosen.seed)
    end = time.monotonic() + 60.0 * chosen.minutes
    rows: list[dict[str, object]] = []
    for cases, sizes in ((schedule(chosen.stop), TWO_RANKS), (schedule_of_four(), FOUR_RANKS)):
        cases = [case for case in cases if chosen.only in case.name]
        if cases and time.monotonic() < end:
            rows += run_cases(cases, sizes, chosen, chance, end)
    facts = {
        "backend": chosen.backend,
        "seed": chosen.seed,
        "hardware": hardware(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).date(),
    }
    new = not ROWS.exists()
    if not rows:
        raise SystemExit("no case was run")
    with ROWS.open("a", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *facts])
        if new:
            writer.writeheader()
        writer.writerows(row | facts for row in rows)
    return int(any(row["lost"] or row["differ"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
