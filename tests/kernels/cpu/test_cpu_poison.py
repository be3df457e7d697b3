"""Every compiled op of the CPU column writes its whole result: earlier contents of memory do not
show.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lockstep.kernels.reference import kv_entries
from lockstep.kernels.reference.column import Reference
from lockstep.kernels.reference.gate import Routing
from lockstep.kernels.reference.rope import angles, frequencies
from lockstep.kernels.reference.sampling import SamplingParams
from lockstep.kernels.table import ops_of
from support.kernels.paged_rows import PagedRows
from support.kernels.poison import poisoned

DRAW = torch.Generator().manual_seed(0)
ROWS = PagedRows([(1100, 1), (17, 1), (30, 12)], 2, page_size=64)


def numbers(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=DRAW).to(dtype)


X, UPDATE, WEIGHT, LOGITS = (
    numbers(7, 40),
    numbers(7, 40),
    numbers(40),
    numbers(3, 33_000, dtype=torch.float32),
)
PAIRS = torch.tensor([0, 1, 1, 2, 4, 6, 6])
SLOTS = torch.tensor([2, 2, -1, 2, 0, 2, 2])  # -1 is padding, slot 1 has no tokens
KEYS, VALUES = (numbers(ROWS.num_pages * 64, 2, 64) for _ in range(2))
PAGES = {"bf16": (KEYS, VALUES), "fp8": (kv_entries.encode_heads(KEYS), kv_entries.encode_heads(VALUES))}
Q, EXPAND, SHARES = numbers(14, 8, 64), numbers(8, 128, 128), torch.rand(7, 3, generator=DRAW)
W13, W2 = EXPAND[:3, :48, :40] * 0.2, EXPAND[3:6, :40, :24] * 0.2
LATENTS = kv_entries.encode_latents(numbers(ROWS.num_pages * 64, 128), numbers(ROWS.num_pages * 64, 64))
ANGLES, CACHE = angles(torch.arange(7), frequencies(16, 1e4)), torch.zeros(7, 2, 16, dtype=torch.bfloat16)
DRAWN = SamplingParams(
    np.full(3, 0.8, np.float32), np.full(3, 30), np.full(3, 0.9, np.float32), np.zeros(3, np.float32)
)
GREEDY = SamplingParams(
    np.zeros(3, np.float32), np.zeros(3, np.int64), np.ones(3, np.float32), np.zeros(3, np.float32)
)

RUNS: dict[str, Callable[[Reference], Any]] = {
    "rms_norm": lambda ops: ops.rms_norm(X, WEIGHT, 1e-6),
    "add_rms_norm": lambda ops: ops.add_rms_norm(X, UPDATE, WEIGHT, 1e-6),
    "silu_mul": lambda ops: ops.silu_mul(X),
    "weighted_sum": lambda ops: ops.weighted_sum(numbers(7, 3, 40) * 0 + 1, SHARES),
    "gate": lambda ops: ops.gate(X, EXPAND[0, :9, :40].float(), None, Routing(3)),
    "experts": lambda ops: ops.experts(
        X, PAIRS, SLOTS, *ops.pack_slots(W13, W2), torch.zeros(3, dtype=torch.int64)
    ),
    "norm_rotate_and_write": lambda ops: ops.norm_rotate_and_write(
        Q[:7, :8, :16], None, ANGLES, (CACHE, CACHE), torch.arange(7), False
    ),
    "attend": lambda ops: ops.attend(Q, *PAGES["bf16"], ROWS.batch, 0.1),
    "attend, fp8": lambda ops: ops.attend(Q, *PAGES["fp8"], ROWS.batch, 0.1),
    "mla_attend, fp8": lambda ops: ops.mla_attend(Q, Q, LATENTS, EXPAND, ROWS.batch, 0.1),
    "sample, greedy": lambda ops: ops.sample(LOGITS, GREEDY, np.zeros(3)),
    "sample": lambda ops: ops.sample(LOGITS, DRAWN, np.full(3, 0.5)),
    "logprobs": lambda ops: ops.logprobs(LOGITS, torch.arange(3), 20),
}


def spoilt(shape: Any, dtype: Any = np.float64) -> Any:
    """``np.empty`` filled with NaN or large integers, as torch's is inside ``poisoned``."""
    whole = np.issubdtype(np.dtype(dtype), np.integer)
    return np.full(shape, (np.uint16(0x7FC0) if dtype == np.uint16 else 1 << 40) if whole else np.nan, dtype)


@pytest.mark.parametrize("name", RUNS)
def test_all_is_written(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    RUNS[name](ops_of("cpu"))  # compiled first, so that numba does not meet the function above
    with monkeypatch.context() as patches, poisoned():
        patches.setattr(np, "empty", spoilt)
        parts = RUNS[name](ops_of("cpu"))
    expected = RUNS[name](ops_of("reference"))
    for part, wanted in zip(*((x if isinstance(x, tuple) else (x,)) for x in (parts, expected)), strict=True):
        torch.testing.assert_close(part.double(), wanted.double(), rtol=5e-2, atol=5e-2)
