"""Measures steps of two ranks at once and as two microbatches, in pairs, with and without a delay
in every collective; then lets ``overlap: auto`` decide.

    python benchmarks/bench_overlap.py [--rounds 40] [--delay 2] [--tensor 2] [--no-auto]

With ``--tensor 2`` the ranks split layers, so sums of attention and runs of tokens travel as well.

The delay passes off the thread: a collective is complete so long after it was started, whatever the
ranks compute meanwhile. The model is a small Qwen3-MoE with random weights in bf16, and each rank
has a thread: its halves of a prompt compute longer than 2 ms between two exchanges.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from circumstances import commit, hardware
from make_qwen3_moe import CONFIG
from torch import Tensor
from torch.distributed import TCPStore

from lockstep.engine.models.config import load_config
from lockstep.engine.models.registry import ModelPart, build_model
from lockstep.engine.planner.flight import Flight
from lockstep.engine.planner.overlap import Overlap
from lockstep.engine.protocol.buckets import bucket_over
from lockstep.engine.protocol.message import Sampling
from lockstep.engine.protocol.plan import Admit, Header, Mode, Section, StepPlan
from lockstep.engine.protocol.results import StepResult
from lockstep.engine.protocol.timeline import StepSpans
from lockstep.engine.rank.executor import Executor
from lockstep.engine.rank.page_pool import KVPool
from lockstep.engine.rank.parts import Parts
from lockstep.moe.balance.placement import contiguous
from lockstep.moe.dispatch.all_to_all import AllToAllExchange
from lockstep.moe.dispatch.exchange import ExchangeDispatcher
from lockstep.parallel.collectives import Collectives, Pending
from lockstep.parallel.dense import split_as_attention
from lockstep.parallel.microbatches import Turns
from lockstep.parallel.pipeline import PipelineLinks
from lockstep.parallel.rank_groups import RankGroups
from lockstep.parallel.stages import whole_model
from lockstep.parallel.tensor import UNSPLIT, TensorGroup

MODEL = CONFIG | {
    "vocab_size": 1024,
    "hidden_size": 512,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_experts": 16,
}
WORLD, PAGE, MAX_LEN, SLOTS = 2, 64, 2048, 128
CPU = torch.device("cpu")
ROWS = Path(__file__).parent / "overlap.csv"
_DELAYS = "exposed", "delayed"
MOST_STEPS = 300
"""Steps that ``auto`` has to decide in."""


@dataclass(frozen=True)
class Case:
    """Rows that decode, each over ``context`` tokens, or one prompt of ``prompt`` tokens, on every
    rank.
    """

    decodes: int
    context: int
    prompt: int = 0

    @property
    def name(self) -> str:
        return f"prompt={self.prompt}" if self.prompt else f"rows={self.decodes} context={self.context}"

    @property
    def capacity(self) -> int:
        return bucket_over(self.prompt or self.decodes)


CASES = (Case(0, 0, prompt=256), Case(0, 0, prompt=512), Case(8, 512))


@dataclass(frozen=True)
class Late(Pending):
    """A collective that is complete at ``due`` at the earliest."""

    due: float = 0.0


class Delayed(Collectives):
    """Collectives that take ``delay`` seconds longer. ``exposed`` and ``delayed``: seconds waited
    out because of that, and of delays in all.
    """

    delay = exposed = delayed = 0.0

    def all_to_all(
        self, rows: Tensor, send: list[int] | None, receive: list[int] | None, what: str
    ) -> Pending:
        return self._late(super().all_to_all(rows, send, receive, what))

    def all_gather(self, rows: Tensor, what: str, fill: int = 0) -> Pending:
        return self._late(super().all_gather(rows, what, fill))

    def reduce_scatter(self, rows: Tensor, what: str) -> Pending:
        return self._late(super().reduce_scatter(rows, what))

    def all_reduce(self, rows: Tensor, what: str) -> Pending:
        return self._late(super().all_reduce(rows, what))

    def _late(self, pending: Pending) -> Pending:
        due = time.perf_counter() + self.delay
        self.delayed += self.delay
        return Late(pending.what, pending.output, pending.work, pending.spread, due)

    def wait(self, pending: Pending) -> Tensor:
        output = super().wait(pending)
        rest = pending.due - time.perf_counter() if isinstance(pending, Late) else 0.0
        if rest > 0:
            begin = time.perf_counter()
            time.sleep(rest)
            self.waited += rest
            self.exposed += rest
            if self.listener is not None:
                self.listener(self.role, begin, time.perf_counter())
        return output


class Rank:
    """A rank that executes the same step again and again, each after a rebase. ``tensor``: the
    ranks that split layers, if they do; all have the same requests then.
    """

    def __init__(self, path: Path, collectives: Delayed, tensor: Delayed | None = None) -> None:
        self.collectives, self._tensor = collectives, tensor
        self.shares: dict[tuple[Case, int], list[float]] = {}
        config = load_config(path)
        placement = contiguous(len(config.moe_layers), config.moe.num_experts, WORLD)
        turns = Turns()
        split = UNSPLIT if tensor is None else TensorGroup(tensor, turns.give)
        splits = split_as_attention(split)
        exchange = AllToAllExchange(placement, collectives, CPU)
        dispatcher = ExchangeDispatcher(exchange, CPU, give_turn=turns.give)
        stage = whole_model(config.num_layers, config.moe_layers)
        alone = Collectives("alone", 0, 1, None, 1.0, CPU)
        model = build_model(config, dispatcher, torch.bfloat16, CPU, part=ModelPart(stage, splits))
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.05)
        model.pack()
        parts = Parts(
            rank=collectives.index,
            model=model,
            dispatcher=dispatcher,
            groups=RankGroups(collectives, *([] if tensor is None else [tensor])),
            splits=splits,
            links=PipelineLinks(alone, stage, CPU),
            turns=turns,
            samples=split.index == 0,
            pool=KVPool(config.part(config.num_layers, split.size), SLOTS * 9, PAGE, "bf16", CPU),
            device=CPU,
        )
        self._executor = Executor(parts, SLOTS, MAX_LEN, 1)
        seed = collectives.index if tensor is None else 0
        self._tokens = np.random.default_rng(seed).integers(2, 1000, MAX_LEN).astype(np.int32)
        self._step, self._staged = 0, 0

    def step(self, case: Case, microbatches: int, trace: bool = False) -> StepResult:
        """Executes the step once. Ranks begin together."""
        length = case.prompt or case.context
        admits = []
        for slot in range(case.decodes or 1):
            self._executor.stage(self._staged, self._tokens[:length].tobytes())
            pages = np.arange(9 * slot, 9 * slot + length // PAGE + 1, dtype=np.int32)
            cached = 0 if case.prompt else length
            admits.append(
                Admit(slot, self._staged, cached, 0, MAX_LEN, pages.tobytes(), Sampling(temperature=0.0))
            )
            self._staged += 1
        extend = np.array([0, length], np.int32).tobytes() if case.prompt else b""
        section = Section(rebase=True, admit=tuple(admits), extend_pairs=extend)
        shape = Mode.MIXED, case.capacity, microbatches
        header = Header(0, 0, self._step, self._step - 1, *shape, trace=trace)
        self._step += 1
        self.gathered(0.0)
        self._executor.submit(StepPlan(header, section))
        result = self._executor.take()
        assert result is not None, "a step on a CPU is done when it has been submitted"
        return result

    @property
    def groups(self) -> list[Delayed]:
        return [self.collectives] if self._tensor is None else [self.collectives, self._tensor]

    def delay(self, seconds: float) -> None:
        """Collectives take so much longer from now on."""
        for group in self.groups:
            group.delay = seconds

    def take_spans(self) -> StepSpans | None:
        """Spans of the last step, if they were asked for."""
        return self._executor.take_spans()

    def gathered(self, *values: float) -> list[list[float]]:
        """The values of all ranks."""
        row = torch.tensor([values], dtype=torch.float64)
        found: list[list[float]] = self.collectives.wait(self.collectives.all_gather(row, "values")).tolist()
        return found

    def pairs(self, case: Case, delay: float, rounds: int) -> dict[tuple[bool, int], list[float]]:
        """Milliseconds of the slower rank by (delayed, microbatches); all four in every round."""
        found: dict[tuple[bool, int], list[float]] = {}
        for number in range(rounds + 2):
            for delayed in (False, True):
                for microbatches in (1, 2) if number % 2 else (2, 1):
                    self.delay(delay * delayed)
                    before = [sum(getattr(group, name) for group in self.groups) for name in _DELAYS]
                    seconds = self.step(case, microbatches).seconds
                    if delayed and number >= 2:
                        after = [sum(getattr(group, name) for group in self.groups) for name in _DELAYS]
                        exposed, total = (end - start for start, end in zip(before, after, strict=True))
                        self.shares.setdefault((case, microbatches), []).append(exposed / total)
                    slowest = max(value for (value,) in self.gathered(seconds))
                    if number >= 2:
                        found.setdefault((delayed, microbatches), []).append(1000 * slowest)
        return found

    def decided(self, case: Case, delay: float) -> tuple[int, float, float | None]:
        """Microbatches that ``auto`` chooses, the share of waits, and the ratio of times."""
        self.delay(delay)
        overlap, none = Overlap("auto", exchanges=True), np.zeros(0, np.int64)
        for number in range(MOST_STEPS):
            flight = Flight(number, none, none > 0, [0], none, none, none, none, None, case.capacity)
            flight.microbatches, flight.unheard = overlap.microbatches(case.capacity), WORLD
            result = self.step(case, flight.microbatches)
            results = [
                StepResult(0, 0, number, rank, seconds=seconds, waited=waited)
                for rank, (seconds, waited) in enumerate(self.gathered(result.seconds, result.waited))
            ]
            overlap.observe(flight, results, 1.0)
            trial = overlap.choices[case.capacity]
            if trial.decided:
                return trial.microbatches, trial.waits or 0.0, trial.ratio
        raise AssertionError(f"{case.name}: no decision in {MOST_STEPS} steps")


def rank_process(path: Path, index: int, port: int, arguments: argparse.Namespace, out: Any) -> None:
    torch.set_num_threads(1)
    store = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=300))
    collectives = Delayed("experts", index, WORLD, store, 300.0, CPU)
    collectives.build(0)
    tensor = Delayed("layers", index, WORLD, store, 300.0, CPU) if arguments.tensor > 1 else None
    if tensor is not None:
        tensor.build(0)
    rank = Rank(path, collectives, tensor)
    for case in CASES:
        delay = arguments.delay / 1000
        measured = rank.pairs(case, delay, arguments.rounds)
        choices = [] if arguments.no_auto else [rank.decided(case, each) for each in (0.0, delay)]
        if index == 0:
            shares = [rank.shares[case, microbatches] for microbatches in (1, 2)]
            out.put((case, measured, choices, shares))
    if index == 0:
        out.put(None)
    rank.gathered(0.0)


def rows_of(
    name: str, measured: dict[tuple[bool, int], list[float]], choices: Any, delay: float
) -> Iterator[tuple[str, ...]]:
    """Rows of a case, and the share of the delay that overlap hides: by the medians of pairs."""
    whole, late = np.array(measured[False, 1]), np.array(measured[True, 1])
    saved = np.median(late - np.array(measured[True, 2])) / np.median(late - whole)
    exposed = np.median(np.array(measured[True, 2]) - np.array(measured[False, 2])) / np.median(late - whole)
    for number, delayed in enumerate((False, True)):
        shape = f"{name} delay={delay * delayed:g}ms"
        for microbatches in (1, 2):
            quantiles = [
                f"{each:.2f}" for each in np.quantile(measured[delayed, microbatches], (0.2, 0.5, 0.8))
            ]
            yield f"step, microbatches={microbatches}", shape, "ms", *quantiles
        if not choices:
            continue
        chosen, waits, ratio = choices[number]
        yield "auto: microbatches", shape, "", "", str(chosen), ""
        yield "auto: share of waits", shape, "", "", f"{waits:.3f}", ""
        yield "auto: time with / without", shape, "", "", "" if ratio is None else f"{ratio:.3f}", ""
    shape = f"{name} delay={delay:g}ms"
    yield "saved / added by the delay", shape, "", "", f"{saved:.3f}", ""
    yield "hidden share of the delay", shape, "", "", f"{1 - exposed:.3f}", ""


@contextmanager
def running_ranks(target: Callable[..., None], arguments: argparse.Namespace) -> Iterator[Any]:
    """Processes that call ``target`` with the model's folder, their index, the port of a store,
    ``arguments`` and a queue, which is yielded. They have ended afterwards.
    """
    path = Path(tempfile.mkdtemp())
    (path / "config.json").write_text(json.dumps(MODEL))
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    out: Any = context.Queue()
    ranks = [
        context.Process(target=target, args=(path, index, store.port, arguments, out), daemon=True)
        for index in range(WORLD)
    ]
    for process in ranks:
        process.start()
    yield out
    for process in ranks:
        process.join(60)
    (path / "config.json").unlink()
    path.rmdir()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--delay", type=float, default=2.0, help="milliseconds of each collective")
    parser.add_argument("--tensor", type=int, choices=(1, 2), default=1, help="ranks that split layers")
    parser.add_argument("--no-auto", action="store_true", help="leaves out what ``auto`` decides")
    arguments = parser.parse_args()
    layout = "" if arguments.tensor == 1 else f"tensor={arguments.tensor} "
    where = hardware(), f"python {platform.python_version()} torch {torch.__version__}", commit()
    with running_ranks(rank_process, arguments) as out:
        while (found := out.get(timeout=900)) is not None:
            case, measured, choices, shares = found
            rows = list(rows_of(layout + case.name, measured, choices, arguments.delay))
            shape = f"{layout}{case.name} delay={arguments.delay:g}ms"
            for microbatches, share in enumerate(shares, 1):
                quantiles = [f"{each:.3f}" for each in np.quantile(share, (0.2, 0.5, 0.8))]
                rows.append((f"waited / delay, microbatches={microbatches}", shape, "", *quantiles))
            with ROWS.open("a", newline="") as file:
                writer = csv.writer(file)
                if not file.tell():
                    writer.writerow(
                        ["what", "shape", "unit", "p20", "p50", "p80", "hardware", "versions", "commit"]
                    )
                for row in rows:
                    writer.writerow([*row, *where])
                    print(*row, sep="\t", flush=True)
    os._exit(0)  # the store's threads do not end by themselves


if __name__ == "__main__":
    main()
