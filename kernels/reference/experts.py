"""Experts: SwiGLU feed-forward blocks, each applied to the rows routed to it, and the weighted sum
of a token's outputs.

A *pair* is one (token, choice). Each of the M pairs names a row of x and the slot with its weights.
Suffixes: N received tokens, T own tokens, K choices per token, M pairs, S expert slots, D hidden, F
expert width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(x_ND: Tensor, w13_FD: Tensor, w2_DF: Tensor) -> Tensor:
    """w2 (silu(gate) * up), with the gate rows of w13 [2F, D] first. Returns [N, D]."""
    gate_NF, up_NF = F.linear(x_ND, w13_FD).chunk(2, -1)
    return F.linear(F.silu(gate_NF) * up_NF, w2_DF)


def experts_reference(
    x_ND: Tensor, rows_M: Tensor, slots_M: Tensor, w13_SFD: Tensor, w2_SDF: Tensor, counts_S: Tensor
) -> Tensor:
    """Applies to every pair the expert in its slot; the plain definition. Returns y_MD in pair
    order, unweighted, in the dtype of x.

    rows_M int64 into x_ND. slots_M int64 into w13_SFD [S, 2F, D] and w2_SDF [S, D, F]. A slot of -1
    is padding: its output is zero, and it is not counted. counts_S int64 is increased by the pairs
    of each slot.
    """
    y_MD = x_ND.new_zeros(len(slots_M), x_ND.shape[1])
    for pair, (row, slot) in enumerate(zip(rows_M.tolist(), slots_M.tolist(), strict=True)):
        if slot >= 0:
            y_MD[pair] = swiglu(x_ND[row : row + 1], w13_SFD[slot], w2_SDF[slot])[0]
            counts_S[slot] += 1
    return y_MD


def weighted_sum(y_TKD: Tensor, weights_TK: Tensor) -> Tensor:
    """Weighted sum of each token's K outputs, in float32 and in the order of k. Returns [T, D] in
    the dtype of y.

    The order is fixed, so the sum depends neither on where the outputs were computed nor on the
    neighbouring tokens.
    """
    sum_TD = y_TKD[:, 0] * weights_TK[:, :1]
    for k in range(1, y_TKD.shape[1]):
        sum_TD = torch.addcmul(sum_TD, y_TKD[:, k], weights_TK[:, k : k + 1])
    return sum_TD.to(y_TKD.dtype)
