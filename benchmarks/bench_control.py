"""Measures the control path: the real controller process, CURVE sockets, simulated ranks and
frontends under steady churn.

    python benchmarks/bench_control.py --ranks 72 --seconds 20

Times are taken at the ranks: from a step's first result leaving a rank to the arrival of the
following plan at the last rank of a process. A second figure is the planner's own time per step,
divided into rows and admissions.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import platform
import queue
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import zmq

from lockstep.engine.controller.controller import Controller
from lockstep.engine.kv.hashing import hash_root
from lockstep.engine.planner.planner import Planner
from lockstep.engine.planner.settings import Settings
from lockstep.engine.protocol.bulk import Preload, Preloaded
from lockstep.engine.protocol.frontends import FrontendHello, Heartbeat, Submit, ToFrontend, TokenBatch
from lockstep.engine.protocol.message import Sampling, Stop, encode
from lockstep.engine.protocol.sockets import client_socket, new_keypair
from lockstep.engine.protocol.specs import ControllerSpec, Keys, SchedulerSpec
from lockstep.engine.simulation.served_ranks import SimulatedRanks, SimulatedSpec
from lockstep.engine.simulation.simulated_group import SimulatedGroup
from lockstep.parallel.mesh import Mesh

PROMPT, OUTPUT, PAGE, MAX_LEN = 4096, 500, 64, 8192
RUNNING_PER_RANK = 128
# Without pacing a plan leaves as soon as it can; that is the time to measure.
SCHEDULER = SchedulerSpec(
    max_running=RUNNING_PER_RANK, max_queue=20_000, pacing=False, inter_token_target=1.0
)
ROWS = Path(__file__).parent / "control.csv"


class Prompts:
    """Random prompts of 4,096 tokens with made-up hashes, in the form that frontends send. Outputs
    have 500 tokens; the first ones are staggered.
    """

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._root = hash_root("bench", "bf16")
        self._tokens = self._random.integers(0, 100_000, PROMPT).astype(np.int32).tobytes()

    def submit(self, handle: int, *, first: bool) -> Submit:
        output = int(self._random.integers(1, OUTPUT + 1)) if first else OUTPUT
        hashes = self._root + self._random.bytes(16 * (PROMPT // PAGE))
        return Submit(
            handle, f"request-{handle}", self._tokens, hashes, PROMPT + output, Sampling(seed=handle)
        )


def controller_process(spec: bytes, addresses: Queue[Any], out: Queue[Any]) -> None:
    controller = Controller(msgspec.json.decode(spec, type=ControllerSpec))
    addresses.put(controller.addresses)
    started, cpu = time.monotonic(), time.process_time()
    status = controller.run()
    assert status is not None, "stopped before all ranks had connected"
    busy = (time.process_time() - cpu) / (time.monotonic() - started)
    own = [1000 * status.plan_seconds.quantile(share) for share in (0.2, 0.5, 0.8, 0.99)]
    out.put(("controller", own, status.largest_plan, busy))


def ranks_process(spec: bytes, out: Queue[Any]) -> None:
    ranks = SimulatedRanks(msgspec.json.decode(spec, type=SimulatedSpec))
    ranks.run()
    out.put(("ranks", ranks.timeline.first_result, ranks.timeline.plan_complete))


def frontends_process(
    names: list[str], keys: bytes, address: str, open_requests: int, seconds: float, out: Queue[Any]
) -> None:
    """Several frontends in one process. Each keeps its share of requests open and replaces every
    one that ends.
    """
    context = zmq.Context()
    client = msgspec.json.decode(keys, type=Keys)
    sockets = {
        client_socket(context, zmq.DEALER, client, name.encode()): Prompts(index)
        for index, name in enumerate(names)
    }
    poller = zmq.Poller()
    decoder = msgspec.msgpack.Decoder(ToFrontend)
    handles = dict.fromkeys(sockets, 0)
    for socket in sockets:
        socket.connect(address)
        socket.send(encode(FrontendHello("bench", 60.0)))
        poller.register(socket, zmq.POLLIN)
    serving: set[Any] = set()
    tokens = admissions = 0
    end, beat = time.monotonic() + seconds, 0.0
    while time.monotonic() < end:
        for socket, _ in poller.poll(100):
            while socket.getsockopt(zmq.EVENTS) & zmq.POLLIN:
                message = decoder.decode(socket.recv())
                fresh = 0
                if isinstance(message, TokenBatch):
                    tokens += len(message.tokens_i32) // 4
                    fresh = int(np.count_nonzero(np.frombuffer(message.finish_u8, np.uint8)))
                elif socket not in serving and getattr(message, "phase", "") == "serving":
                    serving.add(socket)
                    fresh = open_requests
                first = handles[socket] == 0
                for _ in range(fresh):
                    handles[socket] += 1
                    socket.send(encode(sockets[socket].submit(handles[socket], first=first)))
                    admissions += 1
        if time.monotonic() > beat:
            beat = time.monotonic() + 5
            for socket in sockets:
                socket.send(encode(Heartbeat()))
    out.put(("frontends", tokens, admissions))
    for socket in sockets:
        socket.close(linger=0)


def run_control(num_ranks: int, seconds: float, step_seconds: float) -> dict[str, Any]:
    """One run. Returns milliseconds from first result to next plan, as the ranks see them."""
    context = multiprocessing.get_context("spawn")
    addresses: Queue[Any] = context.Queue()
    out: Queue[Any] = context.Queue()
    server, client, launcher = new_keypair(), new_keypair(), new_keypair()
    spec = ControllerSpec(
        host="127.0.0.1",
        secret=server[1],
        public=server[0],
        allowed=(client[0], launcher[0]),
        mesh=Mesh(data=num_ranks),
        scheduler=SCHEDULER,
        model_max_len=MAX_LEN,
        max_len=None,
    )
    controller = context.Process(target=controller_process, args=(msgspec.json.encode(spec), addresses, out))
    controller.start()
    step_address, bulk_address, frontend_address = addresses.get(timeout=30)
    keys = Keys(server_public=server[0], public=client[0], secret=client[1])
    simulated = SimulatedSpec(
        ranks=tuple(range(num_ranks)),
        mesh=spec.mesh,
        keys=keys,
        step_address=step_address,
        bulk_address=bulk_address,
        num_slots=RUNNING_PER_RANK,
        max_len=MAX_LEN,
        num_pages=RUNNING_PER_RANK * 80,
        page_size=PAGE,
        step_seconds=step_seconds,
    )
    names = [f"f{index}" for index in range(8)]
    share = num_ranks * RUNNING_PER_RANK // len(names)
    others = [
        context.Process(target=ranks_process, args=(msgspec.json.encode(simulated), out)),
        context.Process(
            target=frontends_process,
            args=(names, msgspec.json.encode(keys), frontend_address, share, seconds, out),
        ),
    ]
    for process in others:
        process.start()
    try:
        found = _collect(out, seconds, lambda: stop_controller(server[0], launcher, frontend_address))
    finally:
        for process in (*others, controller):
            process.join(timeout=20)
            if process.is_alive():
                process.kill()
    return found


def stop_controller(server_public: str, launcher: tuple[str, str], address: str) -> None:
    context = zmq.Context()
    keys = Keys(server_public=server_public, public=launcher[0], secret=launcher[1])
    socket = client_socket(context, zmq.DEALER, keys, b"launcher")
    socket.connect(address)
    socket.send(encode(Stop("the benchmark is over")))
    socket.close(linger=2000)
    context.term()


def _collect(out: Queue[Any], seconds: float, stop: Callable[[], None]) -> dict[str, Any]:
    _, tokens, admissions = out.get(timeout=seconds + 60)
    stop()
    try:
        rest = {message[0]: message[1:] for message in (out.get(timeout=60), out.get(timeout=60))}
    except queue.Empty:
        raise TimeoutError("controller or simulated ranks sent no figures within 60 s") from None
    first_result, plan_complete = rest["ranks"]
    steps = sorted(step for step in first_result if step + 2 in plan_complete)
    # A step's first result makes room for the plan two steps later, since one is already executing.
    # The first half of the run is the ramp and left out.
    later = steps[len(steps) // 2 :]
    gaps = 1000 * np.array([plan_complete[step + 2] - first_result[step] for step in later])
    own, largest, busy = rest["controller"]
    seen = [float(np.percentile(gaps, share)) for share in (20, 50, 80, 99)]
    return {
        "steps": len(gaps),
        "own": own,
        "seen": seen,
        "largest": largest,
        "busy": busy,
        "tokens": tokens,
        "admissions": admissions,
    }


def run_planner(num_ranks: int, steps: int) -> dict[str, float]:
    """The planner alone, in this process. Returns microseconds per running row and per admission,
    by regression over the steps.
    """
    mesh = Mesh(data=num_ranks)
    settings = Settings(mesh, SCHEDULER, [RUNNING_PER_RANK * 80] * num_ranks, PAGE, MAX_LEN)
    planner, group = Planner(settings), SimulatedGroup(settings)
    prompts, handle, samples = Prompts(0), 0, []
    for step in range(steps):
        missing = num_ranks * RUNNING_PER_RANK - len(planner.group.open)
        fresh = [prompts.submit(handle := handle + 1, first=step == 0) for _ in range(missing)]
        start = time.perf_counter()
        for submit in fresh:
            planner.submit(0, submit)
        plan = planner.plan()
        planner.tidy()
        staging = planner.take_staging()
        planner.take_output()
        spent = time.perf_counter() - start
        for rank, message in staging:
            group.stage(message)
            if isinstance(message, Preload):
                planner.staged(Preloaded(rank, message.staged))
        executed = group.execute(plan) if plan else None
        results = group.results(executed, 0, 2e-3 + 5e-5 * executed.work.tokens_D) if executed else []
        start = time.perf_counter()
        planner.results(results)
        spent += time.perf_counter() - start
        admitted = sum(isinstance(message, Preload) for _, message in staging)
        samples.append((int((planner.group.rows.state == 4).sum()), admitted, spent))
    later = zip(*samples[len(samples) // 2 :], strict=True)
    rows, admissions, seconds = (np.array(column, float) for column in later)
    # A line through the medians for each number of admissions: the intercept is the rows' share,
    # the slope the cost of an admission.
    counts = np.unique(admissions)
    medians = np.array([np.median(seconds[admissions == count]) for count in counts])
    weights = np.sqrt([np.count_nonzero(admissions == count) for count in counts])
    per_admission, of_rows = np.polyfit(counts, medians, 1, w=weights)
    per_row = of_rows / rows.mean()
    return {
        "rows": float(rows.mean()),
        "us_per_row": 1e6 * float(per_row),
        "us_per_admission": 1e6 * float(per_admission),
    }


def write_rows(rows: list[dict[str, object]]) -> None:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    versions = f"python {platform.python_version()}, pyzmq {zmq.__version__}"
    common = {"hardware": f"{os.cpu_count()} cores, {cpu_name()}", "versions": versions, "commit": commit}
    fields = ["what", "shape", "p20", "p50", "p80", "p99", "unit", "limit", *common]
    new = not ROWS.exists()
    with ROWS.open("a", newline="") as file:
        writer = csv.DictWriter(file, fields, restval="")
        if new:
            writer.writeheader()
        for row in rows:
            writer.writerow(row | common)


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def control_rows(num_ranks: int, seconds: float, step_seconds: float) -> list[dict[str, object]]:
    """Measures the control path at ``num_ranks`` ranks. Prints the figures and returns their
    rows.
    """
    goal = 2.0 * num_ranks / 72
    found = run_control(num_ranks, seconds, step_seconds * num_ranks / 72)
    shape = f"{num_ranks} ranks, {num_ranks * RUNNING_PER_RANK} running"
    (_, own, _, own_99), (_, seen, _, seen_99) = found["own"], found["seen"]
    print(
        f"{shape}, {found['steps']} steps, {found['admissions']} requests, {found['tokens']} tokens\n"
        f"  goal: {goal:.0f} ms p50, {2 * goal:.0f} ms p99\n"
        f"  first result read to next plan handed to the sockets: {own:.2f} p50, {own_99:.2f} p99\n"
        f"  first result sent by a rank to next plan received by all: {seen:.2f} p50, {seen_99:.2f} p99\n"
        f"  largest plan {found['largest']} bytes, controller {found['busy']:.0%} of a core, "
        f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    )
    rows: list[dict[str, object]] = []
    for what, key in (
        ("first result read to next plan sent", "own"),
        ("first result sent to next plan received by all", "seen"),
    ):
        times = zip(("p20", "p50", "p80", "p99"), found[key], strict=True)
        row: dict[str, object] = {"what": what, "shape": shape, "unit": "ms", "limit": goal}
        rows.append(row | {name: f"{value:.3f}" for name, value in times})
    return rows


def planner_rows(num_ranks: int) -> list[dict[str, object]]:
    """Measures the planner alone, prints the figures and returns their rows."""
    alone = run_planner(num_ranks, 800)
    print(
        f"  planner alone: {alone['us_per_row']:.3f} us per running row (goal 0.1; vLLM's scheduler"
        f" 10-12), {alone['us_per_admission']:.1f} us per admission (goal 30)"
    )
    shape = f"{alone['rows']:.0f} rows"
    return [
        {"what": what, "shape": shape, "p50": f"{alone[key]:.4f}", "unit": "us", "limit": limit}
        for what, key, limit in (
            ("planner per running row", "us_per_row", 0.1),
            ("planner per admission", "us_per_admission", 30),
        )
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, nargs="+", default=[72, 144])
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--step", type=float, default=0.03, help="seconds per simulated step")
    parser.add_argument("--no-rows", action="store_true", help="only print; add nothing to control.csv")
    arguments = parser.parse_args()
    rows: list[dict[str, object]] = []
    for num_ranks in arguments.ranks:
        rows += control_rows(num_ranks, arguments.seconds, arguments.step)
        rows += planner_rows(num_ranks)
    if not arguments.no_rows:
        write_rows(rows)


if __name__ == "__main__":
    sys.exit(main())
