"""The calls of a rank in the tests of collectives."""

from __future__ import annotations

import os
import time
from datetime import timedelta

import torch
from torch import Tensor

from lockstep.parallel.collectives import CollectiveError, Collectives


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
        return str(error), time.monotonic() - start
    return "", 0.0
