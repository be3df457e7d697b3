"""The vocabulary of the benchmark: an op on tensors that are ready, and its bounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..reference.column import Reference

PAGE_SIZE = 64


@dataclass(frozen=True)
class Call:
    """``bind`` returns a function that runs a column's op. At least ``num_bytes`` must be moved and
    ``flops`` done. ``rivals`` do the same work another way; one whose library is missing raises
    ImportError. Results are compared with ``expected``, or else with the column reference.
    """

    bind: Callable[[Reference], Callable[[], object]]
    num_bytes: float
    flops: float = 0.0
    fp8: bool = False
    rivals: dict[str, Callable[[], object]] = field(default_factory=dict)
    expected: Callable[[], object] | None = None


@dataclass(frozen=True)
class Case:
    """``make`` creates the tensors on a device, ``meta`` included. ``small``: fit to run on a CPU.
    ``card``: meaningful for a card.
    """

    op: str
    shape: str
    make: Callable[[torch.device], Call]
    small: bool = False
    card: bool = True


def random(device: torch.device, *shape: int) -> Tensor:
    """Random bf16 of the same magnitude in all tensors. Not zeros, because zeros draw less
    power.
    """
    return torch.empty(shape, dtype=torch.bfloat16, device=device).uniform_(-0.1, 0.1)
