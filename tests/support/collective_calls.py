"""What a rank does in the tests of collectives."""

from __future__ import annotations

import os
import time

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
            "ragged": collectives.all_to_all(ragged, list(range(1, size + 1)), [rank + 1] * size, "ragged runs"),
            "gathered": collectives.all_gather(rows[:2], "rows"),
            "reduced": collectives.reduce_scatter(rows, "rows"),
        }
        found.append({name: collectives.wait(work) for name, work in pending.items()})
    return found


def one_dies(collectives: Collectives) -> tuple[str, float]:
    """The last rank dies before a collective; what the others are told, and after how many seconds."""
    if collectives.index == collectives.size - 1:
        os._exit(0)
    return _wait_for_all(collectives)


def one_is_late(collectives: Collectives) -> tuple[str, float]:
    """The last rank does not come within the deadline, which is two seconds here."""
    collectives.wait(collectives.all_gather(torch.zeros(1), "everybody"))
    collectives._deadline = collectives._deadline / 10
    collectives.build(1)
    if collectives.index == collectives.size - 1:
        time.sleep(4.0)
        return "", 0.0
    return _wait_for_all(collectives)


def _wait_for_all(collectives: Collectives) -> tuple[str, float]:
    start = time.monotonic()
    try:
        collectives.wait(collectives.all_to_all(torch.zeros(2 * collectives.size, 1), None, None, "tokens of MoE layer 3"))
    except CollectiveError as error:
        return str(error), time.monotonic() - start
    return "", 0.0
