"""The calls of a rank in the tests of collectives."""

from __future__ import annotations

import logging
import os
import random
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import Tensor

from lockstep.parallel import shared_memory
from lockstep.parallel.collectives import CollectiveError, Collectives, Pending
from lockstep.parallel.shared_group import SharedGroup
from lockstep.parallel.shared_memory import REGION


def all_kinds(collectives: Collectives, epochs: int) -> list[dict[str, Tensor]]:
    """Every collective once in each of several epochs."""
    rank, size = collectives.index, collectives.size
    found = []
    for epoch in range(epochs):
        collectives.build(epoch + 1)
        rows = 10 * rank + torch.arange(2 * size).view(size * 2, 1)
        ragged = rank + torch.zeros(size * (size + 1) // 2, 3)  # 1 row to rank 0, 2 to rank 1, ...
        pending = {
            "equal": collectives.all_to_all(rows, None, None, "equal runs"),
            "ragged": collectives.all_to_all(
                ragged, list(range(1, size + 1)), [rank + 1] * size, "ragged runs"
            ),
            "gathered": collectives.all_gather(rows[:2], "rows"),
            "reduced": collectives.reduce_scatter(rows, "rows"),
            "summed": collectives.all_reduce(rows, "rows"),
            "spread": collectives.broadcast(rows.clone(), "rows"),
        }
        found.append({name: collectives.wait(work) for name, work in pending.items()})
    return found


def with_vacancies(collectives: Collectives, vacant: tuple[int, ...]) -> dict[str, Tensor]:
    """Every collective that a group with vacant positions has, once; nothing at these."""
    rank, size = collectives.index, collectives.size
    if rank in vacant:
        return {}
    collectives.build(1, vacant)
    rows = 10 * rank + torch.arange(2 * size).view(size * 2, 1)
    counts = [0 if peer in vacant else peer + 1 for peer in range(size)]
    ragged = rank + torch.zeros(sum(counts), 3)
    received = [0 if peer in vacant else rank + 1 for peer in range(size)]
    pending = {
        "equal": collectives.all_to_all(rows, None, None, "equal runs"),
        "ragged": collectives.all_to_all(ragged, counts, received, "ragged runs"),
        "gathered": collectives.all_gather(rows[:2], "rows", fill=-1),
        "reduced": collectives.reduce_scatter(rows, "rows"),
    }
    return {name: collectives.wait(work) for name, work in pending.items()}


def one_dies(collectives: Collectives) -> tuple[str, float]:
    """The last rank dies before a collective; what the others are told, and after how many
    seconds.
    """
    _all_here(collectives)
    if collectives.index == collectives.size - 1:
        os._exit(0)
    return _wait_for_all(collectives)


def one_is_late(collectives: Collectives) -> tuple[str, float]:
    """The last rank does not come before the others have given up, after a deadline of five
    seconds.
    """
    _all_here(collectives)
    collectives._deadline = timedelta(seconds=5)
    collectives.build(1)
    store = collectives.store
    assert store is not None
    if collectives.index == collectives.size - 1:
        store.wait(["told"], timedelta(seconds=60))
        return "", 0.0
    told = _wait_for_all(collectives)
    store.set("told", "")
    return told


def one_leaves(collectives: Collectives) -> tuple[str, float]:
    """The last rank leaves the group while the others wait for it."""
    _all_here(collectives)
    if collectives.index < collectives.size - 1:
        return _wait_for_all(collectives)
    time.sleep(0.2)
    collectives.destroy()
    store = collectives.store
    assert store is not None
    store.wait([f"told/{index}" for index in range(collectives.size - 1)], timedelta(seconds=60))
    return "", 0.0


def one_dies_before_it_reads(collectives: Collectives) -> str:
    """The first rank spreads more than a peer that has died can ever read."""
    _all_here(collectives)
    if collectives.index == 1:
        os._exit(0)
    try:
        for number in range(100):
            collectives.wait(collectives.broadcast(torch.zeros(4), f"message {number}"))
    except CollectiveError as error:
        return str(error)
    return ""


def time_of_a_wait(collectives: Collectives) -> tuple[float, float]:
    """Seconds, and seconds of CPU, that a rank waits for the last one, which takes its time."""
    _all_here(collectives)
    if collectives.index == collectives.size - 1:
        time.sleep(1.5)
    wall, busy = time.perf_counter(), time.process_time()
    collectives.wait(collectives.all_reduce(torch.zeros(1), "all"))
    return time.perf_counter() - wall, time.process_time() - busy


def through_memory(collectives: Collectives, hidden: int = -1) -> tuple[bool, list[str], list[str]]:
    """Whether a group that meets anew shares memory, where the rank ``hidden`` does not see that of
    the others; the lines of its log; and the mappings and descriptors of memory after it has ended.
    """
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("lockstep.parallel.collectives")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    with pytest.MonkeyPatch.context() as patch:
        if collectives.index == hidden:
            patch.setattr(shared_memory.os, "readlink", lambda path: "/dev/null")
        collectives.build(1)
    shared = isinstance(collectives._group, SharedGroup)
    total = collectives.wait(collectives.all_reduce(torch.ones(1), "all"))
    assert total.tolist() == [collectives.size]
    collectives.destroy()
    with open("/proc/self/maps") as maps:
        left = [line for line in maps if "memfd:lockstep" in line]
    for descriptor in os.listdir("/proc/self/fd"):
        path = f"/proc/self/fd/{descriptor}"
        if os.path.islink(path) and "memfd:lockstep" in os.readlink(path):
            left.append(path)
    return shared, lines, left


def same_calls_twice(collectives: Collectives, num_calls: int) -> list[str]:
    """Random calls of all sizes, also of more than goes through memory, two under way at a time.
    The calls whose results differ from those of a group that has gloo alone.
    """
    size, index = collectives.size, collectives.index
    plain = Collectives("plain", index, size, collectives.store, 60.0, collectives.device, memory=False)
    plain.build(0)
    assert isinstance(collectives._group, SharedGroup) and not isinstance(plain._group, SharedGroup)
    together, own = random.Random(3), random.Random(index)
    wrong: list[str] = []
    under_way: list[tuple[str, Pending, Pending]] = []
    for number in range(num_calls):
        calls = _random_calls(together, collectives, f"call {number}")
        under_way.append((calls[0], calls[1](collectives), calls[1](plain)))
        if own.random() < 0.1:
            time.sleep(0.002)
        while len(under_way) > (number < num_calls - 1):
            what, shared, other = under_way.pop(0)
            if not torch.equal(collectives.wait(shared), plain.wait(other)):
                wrong.append(what)
    return wrong


def _random_calls(dice: random.Random, collectives: Collectives, what: str) -> tuple[str, Any]:
    """The name of a collective, and a call of it in any group. Every rank draws the same."""
    size, index = collectives.size, collectives.index
    kind = dice.choice(("equal", "ragged", "gather", "scatter", "sum", "spread"))
    width = dice.choice((1, 7, 512))
    limit = REGION // (4 * width)
    counts = [
        [dice.choice((0, 1, 5, dice.choice((5, limit, limit + 1)))) for _ in range(size)] for _ in range(size)
    ]
    length = dice.choice((1, 8, dice.choice((8, size * limit + size)))) * size
    draw = torch.Generator().manual_seed(1000 * dice.randrange(1000) + index)
    rows = torch.randn(length, width, generator=draw)
    if kind == "ragged":
        sent, received = counts[index], [line[index] for line in counts]
        rows = torch.randn(sum(sent), width, generator=draw)
        return f"{kind} {counts}", lambda group: group.all_to_all(rows, sent, received, what)
    if kind in ("scatter", "sum") and size > 2:
        rows = rows.round()  # of which sums are exact in any order
    call = {
        "equal": lambda group: group.all_to_all(rows, None, None, what),
        "gather": lambda group: group.all_gather(rows, what),
        "scatter": lambda group: group.reduce_scatter(rows, what),
        "sum": lambda group: group.all_reduce(rows, what),
        "spread": lambda group: group.broadcast(rows.clone(), what),
    }[kind]
    return f"{kind} of {length} x {width}", call


def sums_of_ranks(collectives: Collectives) -> tuple[Tensor, Tensor]:
    """A sum of values that depends on its order, and this rank's run of it."""
    rows = _unlike(collectives.index, collectives.size)
    total = collectives.wait(collectives.all_reduce(rows, "all"))
    return total, collectives.wait(collectives.reduce_scatter(rows, "runs"))


def _unlike(rank: int, size: int) -> Tensor:
    return 10.0 ** (3 * rank) * torch.rand(size, 50, generator=torch.Generator().manual_seed(rank))


def sum_in_order(size: int) -> Tensor:
    """The sum of ``sums_of_ranks``, added by rank."""
    total = _unlike(0, size)
    for rank in range(1, size):
        total = total + _unlike(rank, size)
    return total


def _all_here(collectives: Collectives) -> None:
    """Returns once every rank has built its group. By the store: no rank is then in the middle of a
    collective.
    """
    store = collectives.store
    assert store is not None
    store.set(f"built/{collectives.index}", "")
    store.wait([f"built/{index}" for index in range(collectives.size)], timedelta(seconds=60))


def _wait_for_all(collectives: Collectives) -> tuple[str, float]:
    start = time.monotonic()
    try:
        collectives.wait(
            collectives.all_to_all(torch.zeros(2 * collectives.size, 1), None, None, "tokens of MoE layer 3")
        )
    except CollectiveError as error:
        assert collectives.store is not None
        collectives.store.set(f"told/{collectives.index}", "")
        return str(error), time.monotonic() - start
    return "", 0.0
