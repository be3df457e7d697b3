"""A trace of decode steps by torch's profiler, for chrome://tracing or https://ui.perfetto.dev, and
rows of the kernels that took longest: a rank alone under a real planner, with the first layers of a
model's shape and random weights. ``host_steps.csv`` has the host's time of decode steps: to plan
one, and to hand it to the device.

    python benchmarks/profile_steps.py --config recipes/configs/qwen3-30b-a3b --out OUT
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.profiler import ProfilerActivity, profile

from lockstep.engine.planner.planner import Planner
from lockstep.engine.planner.settings import Settings
from lockstep.engine.protocol.buckets import bucket_over
from lockstep.engine.protocol.bulk import Preload, Preloaded
from lockstep.engine.protocol.frontends import Submit
from lockstep.engine.protocol.message import Sampling
from lockstep.engine.protocol.plan import StepPlan
from lockstep.engine.protocol.specs import Keys, RankSpec, SchedulerSpec
from lockstep.engine.rank.executor import Executor
from lockstep.engine.rank.process import load_executor
from lockstep.parallel.mesh import Mesh

_PROMPT, _WARM_UP, _MAX_LEN, _ROWS_KEPT, _HOST_STEPS = 64, 8, 512, 40, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(",")[0])
    parser.add_argument("--config", type=Path, required=True, help="folder with the model's config.json")
    parser.add_argument("--layers", type=int, default=8, help="layers of the model")
    parser.add_argument("--rows", type=int, default=32, help="requests that decode")
    parser.add_argument("--host", default="64,256", help="requests that decode for host_steps.csv: N,...")
    parser.add_argument("--steps", type=int, default=16, help="steps in the trace")
    parser.add_argument("--out", type=Path, required=True, help="folder of profile.json and profile.csv")
    arguments = parser.parse_args()
    host = [int(rows) for rows in arguments.host.split(",")]
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        fields = json.loads((arguments.config / "config.json").read_text(encoding="utf-8"))
        fields["num_hidden_layers"] = min(arguments.layers, fields["num_hidden_layers"])
        (Path(folder) / "config.json").write_text(json.dumps(fields), encoding="utf-8")
        most = max(arguments.rows, *host)
        executor = load_executor(_spec(Path(folder), most, device), lambda fraction: None)
    planner = _begin(executor, arguments.rows, _WARM_UP + arguments.steps + 4)
    _decode(planner, executor, _WARM_UP)
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device != "cpu")
    with profile(activities=kinds) as found:
        _decode(planner, executor, arguments.steps)
    arguments.out.mkdir(parents=True, exist_ok=True)
    found.export_chrome_trace(str(arguments.out / "profile.json"))
    _write_rows(found, arguments.out / "profile.csv", arguments.steps)
    _write_host(executor, host, fields["num_hidden_layers"], arguments.out / "host_steps.csv")
    executor.close()


def _spec(model: Path, rows: int, device: str) -> RankSpec:
    nobody = Keys(server_public="", public="", secret="")
    return RankSpec(
        rank=0,
        mesh=Mesh(),
        keys=nobody,
        step_address="",
        bulk_address="",
        store_address="",
        store_keys=nobody,
        model_path=str(model),
        dtype="bf16",
        keep_fp8=False,
        kv_dtype="bf16" if device == "cpu" else "fp8",
        page_size=64,
        kv_memory=None,
        ranks_per_host=1,
        max_running=rows,
        max_len=_MAX_LEN,
        dispatch="local",
        device=device,
        threads=torch.get_num_threads(),
        weights="random",
        capacity=bucket_over(_PROMPT * rows),
    )


def _begin(executor: Executor, rows: int, num_new: int) -> Planner:
    """A planner of ``rows`` requests that the executor knows."""
    hello = executor.hello()
    spec = SchedulerSpec(max_running=rows, max_batch_tokens=_PROMPT * rows)
    planner = Planner(Settings(Mesh(), spec, [hello.num_pages], hello.page_size, _MAX_LEN))
    executor.begin_epoch(0, ())
    tokens = np.random.default_rng(1).integers(2, 1000, (rows, _PROMPT)).astype(np.int32)
    for row in range(rows):
        limit, sampling = _PROMPT + num_new, Sampling(temperature=0.7, top_k=50, top_p=0.9, seed=row)
        planner.submit(0, Submit(row, str(row), tokens[row].tobytes(), b"", limit, sampling))
    planner.tidy()
    for _, message in planner.take_staging():
        if isinstance(message, Preload):
            executor.stage(message.staged, message.tokens_i32)
            planner.staged(Preloaded(0, message.staged))
    planner.tidy()
    return planner


def _decode(planner: Planner, executor: Executor, steps: int) -> NDArray[np.float64]:
    """Steps one ahead of their results, as a controller sends them. Returns seconds [N, 2] of
    the host: to plan each, and to submit it.
    """
    taken, seconds = 0, []
    while taken < steps:
        began = time.perf_counter()
        if planner.wants_plan and (plan := planner.plan()) is not None:
            planned = time.perf_counter()
            executor.submit(StepPlan(plan.header, plan.sections[0]))
            seconds.append((planned - began, time.perf_counter() - planned))
        if (result := executor.take()) is not None:
            planner.results([result])
            planner.tidy()
            taken += 1
    return np.array(seconds)


def _write_host(executor: Executor, host: list[int], layers: int, path: Path) -> None:
    """The host's milliseconds of a decode step, by rows: the goal is 0.3 to submit one of 256."""
    with path.open("w", encoding="utf-8", newline="") as file:
        written = csv.writer(file)
        written.writerow(["rows", "layers", "part", "p20_ms", "p50_ms", "p80_ms"])
        for rows in host:
            planner = _begin(executor, rows, _WARM_UP + _HOST_STEPS + 4)
            _decode(planner, executor, _WARM_UP)
            seconds = _decode(planner, executor, _HOST_STEPS)
            for part, values in zip(("plan", "submit"), seconds.T, strict=True):
                percentiles = np.percentile(values * 1e3, (20, 50, 80))
                written.writerow([rows, layers, part, *(f"{value:.3f}" for value in percentiles)])


def _write_rows(found: profile, path: Path, steps: int) -> None:
    """The ops and kernels that took longest, in microseconds of a step."""
    key = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    ranked = sorted(found.key_averages(), key=lambda each: -float(getattr(each, key)))
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["name", "calls a step", "us a step"])
        for each in ranked[:_ROWS_KEPT]:
            rows.writerow([each.key, f"{each.count / steps:.1f}", f"{getattr(each, key) / steps:.1f}"])


if __name__ == "__main__":
    main()
