"""A round of DeepSeek-V3's tokens through an exchange, on tensors without values: whoever reads one
on the host fails.
"""

from __future__ import annotations

import torch

from lockstep.kernels.reference.fp8 import Quantised
from lockstep.moe.dispatch.exchange import Exchange

_HIDDEN, _TOP_K, _LAYER = 7168, 8, 57


def exchange_without_memory(
    exchange: Exchange, rows: int, capacity: int, eight: bool, expected: tuple[int, int]
) -> None:
    """``expected``: the numbers of rows received and of their pairs."""
    num_received, num_pairs = expected
    meta = torch.device("meta")
    exchange.begin_step(rows, capacity)
    x = torch.empty(rows, _HIDDEN, dtype=torch.bfloat16, device=meta)
    ids = torch.empty(rows, _TOP_K, dtype=torch.int64, device=meta)
    handle = exchange.dispatch(x, ids, torch.empty(rows, _TOP_K, device=meta), _LAYER)
    received = exchange.receive(handle)
    tokens = received.x_ND.values if isinstance(received.x_ND, Quantised) else received.x_ND
    assert isinstance(received.x_ND, Quantised) == eight and tokens.shape == (num_received, _HIDDEN)
    assert received.slots_M.shape == received.rows_M.shape == (num_pairs,)
    exchange.send_back(torch.empty(num_pairs, _HIDDEN, dtype=torch.bfloat16, device=meta), handle)
    combined = exchange.combine(handle)
    assert combined.shape == x.shape and combined.dtype == x.dtype
