"""Products with weights as they were loaded.

A column may *pack* weights once after loading, into the form that its kernels read fastest. Only
ops of the same column read packed weights. The reference leaves them as they are.

N rows of a weight  D inner dim  S expert slots  F width of an expert
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight_ND: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """x W^T + b over the last dim of x [..., D]. The weight may be packed."""
    return F.linear(x, weight_ND, bias_N)


def pack(weights: Tensor) -> Tensor:
    """A weight [N, D] in the form that ``linear`` reads fastest."""
    return weights


def pack_slots(w13_SFD: Tensor, w2_SDF: Tensor) -> tuple[Tensor, Tensor]:
    """The weights of expert slots, w13 [S, 2F, D] and w2 [S, D, F], in the form that ``experts``
    reads fastest.
    """
    return w13_SFD, w2_SDF
