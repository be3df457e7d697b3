"""Steps of a real planner for one executor: prompts in chunks, prefix hits, preemption for want of
pages, grammars, a rebase. Another executor can execute the same plans.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from lockstep.engine.kv.hashing import chain_hashes, hash_root
from lockstep.engine.planner.outbox import Start
from lockstep.engine.planner.planner import Planner
from lockstep.engine.planner.settings import Settings
from lockstep.engine.protocol.bulk import Preload, Preloaded, Unload
from lockstep.engine.protocol.frontends import Started, Submit
from lockstep.engine.protocol.message import Sampling
from lockstep.engine.protocol.plan import StepPlan
from lockstep.engine.protocol.results import StepResult
from lockstep.engine.protocol.specs import SchedulerSpec
from lockstep.engine.rank.executor import Executor
from lockstep.parallel.mesh import Mesh

from .hand_plans import NUM_SLOTS, PAGE_SIZE
from .run_step import run_step

ROOT = hash_root("model", "fp8")
Event = Preload | Unload | StepPlan


@dataclass(frozen=True)
class Asked:
    """A request, sent before the step ``start``."""

    start: int
    prompt: list[int]
    num_new: int
    sampling: Sampling
    grammar: str = ""


@dataclass
class Planned:
    """All that a rank was told, its results, and how each start of a request went."""

    events: list[Event] = field(default_factory=list)
    results: list[StepResult] = field(default_factory=list)
    starts: list[Start] = field(default_factory=list)

    @property
    def plans(self) -> list[StepPlan]:
        return [event for event in self.events if isinstance(event, StepPlan)]


def planned(
    executor: Executor, requests: list[Asked], num_pages: int, most_tokens: int, rebase_at: int
) -> Planned:
    """Executes the requests to their ends; the rank is rebased before the step ``rebase_at``."""
    spec = SchedulerSpec(max_running=NUM_SLOTS, max_batch_tokens=most_tokens, checksum_every=1)
    planner = Planner(Settings(Mesh(), spec, [num_pages], PAGE_SIZE, max_len=256))
    found, step = Planned(), 0
    waiting = deque(sorted(enumerate(requests), key=lambda entry: entry[1].start))
    while waiting or not planner.idle():
        while waiting and waiting[0][1].start <= step:
            planner.submit(0, _submit(*waiting.popleft()))
        if step == rebase_at:
            planner.resync(0)
        planner.tidy()
        for _, message in planner.take_staging():
            found.events.append(message)
            tell(executor, message)
            if isinstance(message, Preload):
                planner.staged(Preloaded(0, message.staged))
        planner.tidy()
        plan = planner.plan()
        if plan is not None:
            section_plan = StepPlan(plan.header, plan.sections[0])
            found.events.append(section_plan)
            found.results.append(run_step(executor, section_plan))
            planner.results(found.results[-1:])
        found.starts += _starts(planner)
        step += 1
        assert step < 200, "requests never finish"
    return found


def executed_again(executor: Executor, events: list[Event], depth: int) -> list[StepResult]:
    """The results of the same plans, of which ``depth`` are under way at a time."""
    executor.begin_epoch(0, ())
    found: list[StepResult] = []
    under_way, end = 0, time.monotonic() + 280
    for event in [*events, None]:
        while under_way >= depth or (under_way and event is None):
            if (result := executor.take()) is not None:
                found.append(result)
                under_way -= 1
            assert time.monotonic() < end, f"{len(found)} results within 280 s"
        if isinstance(event, StepPlan):
            executor.submit(event)
            under_way += 1
        elif event is not None:
            tell(executor, event)
    return found


def tell(executor: Executor, message: Preload | Unload) -> None:
    """Hands over a prompt, and waits until its grammar has been compiled; or takes it back."""
    if isinstance(message, Unload):
        executor.unstage(message.staged)
    elif not executor.stage(message.staged, message.tokens_i32, message.grammar, message.num_emitted):
        end = time.monotonic() + 60
        while not (done := executor.take_compiled()):
            assert time.monotonic() < end, "a grammar is compiled within 60 s"
            time.sleep(0.001)
        assert done == [(message.staged, "")]


def _submit(handle: int, asked: Asked) -> Submit:
    tokens = np.array(asked.prompt, np.int32).tobytes()
    return Submit(
        handle=handle,
        request_id=str(handle),
        prompt_i32=tokens,
        hashes_h128=chain_hashes(ROOT, tokens, PAGE_SIZE),
        limit=len(asked.prompt) + asked.num_new,
        sampling=asked.sampling,
        grammar=asked.grammar,
    )


def _starts(planner: Planner) -> Iterator[Start]:
    for _, message in planner.take_output():
        if isinstance(message, Started):
            packed = message.cached_i32, message.data_i32, message.preemptions_i32, message.epochs_i32
            columns = (np.frombuffer(column, np.int32).tolist() for column in packed)
            for handle, *start in zip(
                np.frombuffer(message.handles_i64, np.int64).tolist(), *columns, strict=True
            ):
                yield Start(handle, *start)
