"""Tokens on the wire: one row of bytes holds a token's hidden state and the places of its K
experts.

Suffixes: T, N rows, K choices, D hidden, G = ceil(D / 128).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.formats.fp8_format import BLOCK
from ...kernels.reference.fp8 import Normed, NormedRows, Quantised, wide_of

Tokens = Tensor | Quantised
"""Hidden states in the model's dtype, or quantised as experts in FP8 take them."""


@dataclass(frozen=True)
class TokenForm:
    """The form in which hidden states travel to experts: in ``dtype``, or in FP8 if ``quantise`` is
    given: their values, then their scales.
    """

    hidden: int
    dtype: torch.dtype
    quantise: Callable[[Tensor], Quantised] | None = None

    @property
    def num_bytes(self) -> int:
        if self.quantise is None:
            return self.hidden * self.dtype.itemsize
        return self._scales_at + 4 * -(-self.hidden // BLOCK)

    @property
    def _scales_at(self) -> int:
        return -(-self.hidden // 16) * 16

    def of(self, rows: Normed) -> tuple[Tensor, ...]:
        """The parts of hidden states, in the order of ``parts``."""
        if self.quantise is None:
            return (wide_of(rows),)
        x = rows.eight if isinstance(rows, NormedRows) else self.quantise(rows)
        return x.values.view(torch.uint8), x.scales

    def parts(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Views of rows uint8 [N, bytes or more]: [N, D] in ``dtype``; or uint8 [N, D] and float32
        [N, G].
        """
        if self.quantise is None:
            return (rows[:, : self.num_bytes].view(self.dtype),)
        return rows[:, : self.hidden], rows[:, self._scales_at : self.num_bytes].view(torch.float32)

    def read(self, rows: Tensor) -> Tokens:
        """The hidden states of rows: views."""
        parts = self.parts(rows)
        if len(parts) == 1:
            return parts[0]
        return Quantised(parts[0].view(torch.float8_e4m3fn), parts[1])


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
