"""An op on tensors that lie ready, and what bounds it: the words of the benchmark."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..table import Ops

PAGE_SIZE = 64


@dataclass(frozen=True)
class Call:
    """``bind`` gives a column's run. ``num_bytes`` must be moved and ``flops`` done at least.
    ``rivals`` do the same otherwise; one whose library is missing raises ImportError. ``expected``
    is what a result is compared with, else the column reference's.
    """

    bind: Callable[[Ops], Callable[[], object]]
    num_bytes: float
    flops: float = 0.0
    fp8: bool = False
    rivals: dict[str, Callable[[], object]] = field(default_factory=dict)
    expected: Callable[[], object] | None = None


@dataclass(frozen=True)
class Case:
    """``make`` lays out the tensors on a device; on ``meta`` too. ``small``: fit to run on a CPU;
    ``card``: it says something of a card.
    """

    op: str
    shape: str
    make: Callable[[torch.device], Call]
    small: bool = False
    card: bool = True


def random(device: torch.device, *shape: int) -> Tensor:
    """bf16, of one size in all tensors: not zero, because zeros draw less power."""
    return torch.empty(shape, dtype=torch.bfloat16, device=device).uniform_(-0.1, 0.1)
