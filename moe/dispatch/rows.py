"""Tokens on the wire: one row of bytes holds a token's hidden state and the places of its K
experts.

Suffixes: N rows, K choices, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack(x_ND: Tensor, places_NK: Tensor) -> Tensor:
    """uint8 [N, bytes]: the bits of x, then the places as int32. ``unpack`` is exact."""
    (num_rows, hidden), top_k = x_ND.shape, places_NK.shape[1]
    rows = torch.empty(num_rows, hidden * x_ND.itemsize + 4 * top_k, dtype=torch.uint8, device=x_ND.device)
    x, places = unpack(rows, hidden, x_ND.dtype)
    x.copy_(x_ND)
    places.copy_(places_NK)
    return rows


def unpack(rows: Tensor, hidden: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x_ND in ``dtype`` and places_NK int32, both views of ``rows``."""
    width = hidden * dtype.itemsize
    return rows[:, :width].view(dtype), rows[:, width:].view(torch.int32)
