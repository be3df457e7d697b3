"""Root-mean-square normalisation (arXiv 1910.07467) and the product inside a SwiGLU block."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dim of x [..., D]. Computed in float32, returned in x's
    dtype.
    """
    return F.rms_norm(x, weight_D.shape, weight_D, eps)


def add_rms_norm(x: Tensor, update: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum x + update, rounded to x's dtype, and the norm of that rounded sum. Both are [...,
    D].
    """
    total = x + update
    return total, rms_norm(total, weight_D, eps)


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of gate_up [..., 2F], gate first. Returns [..., F]."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up
