"""The device of Triton tests, and memory that shows what a kernel forgot to write."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN, or the largest integer, inside the block."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all() and (torch.empty(3, dtype=torch.int32) > 1 << 30).all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)
