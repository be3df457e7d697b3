"""Ranks whose steps are two microbatches: the order of their collectives, and a death in the middle
of a step.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import Store

from lockstep.engine.protocol.timeline import StepSpans
from lockstep.engine.rank.contract import StepAbandoned
from lockstep.parallel.collectives import Collectives, Pending

from ...parallel.gloo_ranks import meet
from ...parallel.late_ranks import late_ranks
from .greedy_prompts import load_prompts
from .hand_plans import Driver, Request, build_executor
from .late_device import LateDevice

FAMILY = "qwen3_moe"
CPU = torch.device("cpu")


class Watched(Collectives):
    """Collectives that note exchanges, and sums and gathered rows if asked by ``all_kinds``, and
    drop the connections at the exchange numbered ``last``.
    """

    def __init__(self, inner: Collectives, name: str = "watched") -> None:
        super().__init__(name, inner.index, inner.size, inner.store, 240.0, inner.device)
        self.started: list[str] = []
        self.last = -1
        self.all_kinds = False

    def all_to_all(
        self, rows: Tensor, send: list[int] | None, receive: list[int] | None, what: str
    ) -> Pending:
        self.started.append(what)
        if len(self.started) == self.last:
            self.destroy()
            raise ArithmeticError("a bug")
        return super().all_to_all(rows, send, receive, what)

    def all_gather(self, rows: Tensor, what: str, fill: int = 0) -> Pending:
        return self._noted(super().all_gather, rows, what, fill)

    def reduce_scatter(self, rows: Tensor, what: str) -> Pending:
        return self._noted(super().reduce_scatter, rows, what)

    def all_reduce(self, rows: Tensor, what: str) -> Pending:
        return self._noted(super().all_reduce, rows, what)

    def _noted(self, start: Callable[..., Pending], rows: Tensor, what: str, *more: int) -> Pending:
        self.started += [what] * self.all_kinds
        return start(rows, what, *more)


def order_of_collectives(collectives: Collectives, path: Path) -> list[str]:
    """The collectives of some steps: a rank with two prompts, one with one, one without any."""
    watched = Watched(collectives)
    watched.build(0)
    watched.started.clear()
    prompts = [entry.prompt for entry in load_prompts(FAMILY)[: 2 - collectives.index]]
    requests = [Request(prompt, 4, start=number) for number, prompt in enumerate(prompts)]
    Driver(build_executor(path, watched, "all_to_all"), requests, _capacity, microbatches=2).run(6)
    return watched.started


def order_beside_tensor_groups(collectives: Collectives, path: Path) -> tuple[list[str], list[str]]:
    """As ``order_of_collectives`` on groups of two ranks that split layers, the second of which
    never has a token: what ranks started for experts, and in their group.
    """
    watched, (data, index) = Watched(collectives), divmod(collectives.index, 2)
    name = f"layers of data {data}"
    group = Watched(meet(name, index, 2, collectives), name)
    for each in (watched, group):
        each.build(1)
        each.started.clear()
    group.all_kinds = True
    prompts = [] if data else [entry.prompt for entry in load_prompts(FAMILY)[:2]]
    requests = [Request(prompt, 4, start=number) for number, prompt in enumerate(prompts)]
    executor = build_executor(path, watched, "all_to_all", tensor=group)
    Driver(executor, requests, _capacity, microbatches=2).run(6)
    return watched.started, [what for what in group.started if "columns" not in what]


def continue_on_devices(
    collectives: Collectives, path: Path
) -> tuple[dict[int, list[list[int]]], dict[int, list[tuple[int, int]]]]:
    """As ``continue_in_stages`` by the executor of a device, on one that is late, whose messages
    are those of NCCL.
    """
    with late_ranks() as late:
        found = continue_in_stages(collectives, path, late)
        assert not late.faults, late.faults
    return found


def continue_in_stages(
    collectives: Collectives, path: Path, late: LateDevice | None = None
) -> tuple[dict[int, list[list[int]]], dict[int, list[tuple[int, int]]]]:
    """Tokens of prompts, whole and cut, by microbatches, where all ranks share the layers of a
    model; and the tags of the hidden states that travelled, with their numbers of tokens.
    """
    found, travelled = {}, {}
    for microbatches in (1, 2):
        stages, tokens = (
            Relayed(f"{role} {microbatches}", collectives.index, collectives.size, collectives.store)
            for role in ("stages", "tokens")
        )
        stages.build(0)
        tokens.build(0)
        requests = [
            Request(entry.prompt, len(entry.tokens), start=number, chunk=20 if number % 2 else 10_000)
            for number, entry in enumerate(load_prompts(FAMILY)[:4])
        ]
        executor = build_executor(path, stages=stages, tokens=tokens, as_device=late is not None)
        if late is not None:
            executor.submit = late.within(executor.submit)  # type: ignore[method-assign]
        found[microbatches] = Driver(executor, requests, microbatches=microbatches).run()
        travelled[microbatches] = stages.messages
        collectives.wait(collectives.all_gather(torch.zeros(1), "the end"))
    return found, travelled


class Relayed(Collectives):
    """Collectives that note the rows and tags of the hidden states that they send."""

    def __init__(self, name: str, index: int, size: int, store: Store | None) -> None:
        super().__init__(name, index, size, store, 240.0, CPU)
        self.messages: list[tuple[int, int]] = []

    def send(self, rows: Tensor, to: int, tag: int, what: str) -> Pending:
        assert rows.is_floating_point() == (self.role == "stages")
        if rows.is_floating_point():
            self.messages.append((tag, len(rows)))
        return super().send(rows, to, tag, what)


def one_fails(collectives: Collectives, path: Path, last: int) -> tuple[str, int, tuple[int, int]]:
    """The last rank fails as it starts its collective number ``last``, and is gone for the others.
    The error of this rank, the steps that it had executed, and two further microbatches.
    """
    mortal = collectives.index == collectives.size - 1
    watched = Watched(collectives)
    watched.build(0)
    watched.started.clear()
    watched.last = last if mortal else -1
    executor = build_executor(path, watched, "all_to_all")
    requests = [Request(load_prompts(FAMILY)[0].prompt, 8)]
    driver = Driver(executor, requests, _capacity, microbatches=2)
    error = ""
    try:
        driver.run(8)
    except (StepAbandoned, ArithmeticError) as failure:
        error = f"{type(failure).__name__}: {failure}"
    return error, len(driver.results), executor._parts.turns.run(lambda: 1, lambda: 2)


def spans_of_steps(
    collectives: Collectives, path: Path, microbatches: int
) -> tuple[list[StepSpans], tuple[list[list[int]], list[list[int]]]]:
    """The spans of every second step, and the tokens of all steps with and without asking."""
    experts = Collectives("experts", collectives.index, collectives.size, collectives.store, 240.0, CPU)
    experts.build(0)
    prompts = [entry.prompt for entry in load_prompts(FAMILY)[collectives.index :: 2][:2]]
    tokens, spans = [], []
    for asking in (True, False):
        executor = build_executor(path, experts, "all_to_all")
        requests = [Request(prompt, 6) for prompt in prompts]
        driver = Driver(executor, requests, _capacity, microbatches=microbatches)
        for step in range(6):
            driver.trace = asking and step % 2 == 1
            driver.step(step)
            found = executor.take_spans()
            assert (found is not None) == driver.trace, f"step {step}"
            spans += [] if found is None else [found]
        tokens.append([request.tokens for request in driver.requests])
    return spans, (tokens[0], tokens[1])


def _capacity(step: int) -> int:
    return 640 if step < 2 else 16
