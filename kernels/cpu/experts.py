"""Experts on a CPU: sorts pairs by slot, then computes two products per slot hit. ``expert_blocks``
does the same for weights in blocks.

N received tokens  M pairs  S slots  D hidden  F width  T own tokens  K choices per token
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numba import njit
from torch import Tensor

from ..reference import experts as reference
from ..reference.experts import PLAIN_FORM, ExpertForm
from . import expert_blocks as cpu_expert_blocks
from .codegen.arrays import ALONE, array, computes, inner, made, narrow, widen
from .codegen.threads import share_out
from .expert_blocks import ordered
from .linear import linear
from .norm import silu_mul


def experts(
    x_ND: Tensor,
    rows_M: Tensor,
    slots_M: Tensor,
    w13_SFD: Tensor | Sequence[Tensor],
    w2_SDF: Tensor | Sequence[Tensor],
    counts_S: Tensor,
    form: ExpertForm = PLAIN_FORM,
) -> Tensor:
    """Same as ``experts.experts_reference``. The host reads the counts.

    Weights that are not in blocks may be packed one by one for ``linear``. A loop over the slots
    hit beats grouped and batched products on a CPU: ``torch._grouped_mm`` over 32 experts took 4.4
    ms however few the rows, and gathering weights for a batched product took 3 to 20 times as long
    as the loop (2 cores with AMX, torch 2.13).
    """
    if isinstance(w13_SFD, Tensor) and isinstance(w2_SDF, Tensor) and w13_SFD.dim() == 5:
        return cpu_expert_blocks.experts(x_ND, rows_M, slots_M, w13_SFD, w2_SDF, counts_S, form)
    order_M, ends_S, y_MD = ordered(x_ND, slots_M, counts_S)
    if not len(order_M):
        return y_MD
    plain = form.activation.kind == "silu"
    order = torch.from_numpy(order_M)
    x_MD = x_ND.index_select(0, rows_M.index_select(0, order))
    parts, start = [], 0
    for slot, end in enumerate(ends_S.tolist()):
        if end > start:
            up_bias, down_bias = form.of(slot)
            gate_up_NF = linear(x_MD[start:end], w13_SFD[slot], up_bias)
            inner_NF = silu_mul(gate_up_NF) if plain else reference.activate(gate_up_NF, form.activation)
            parts.append(linear(inner_NF, w2_SDF[slot], down_bias))
            start = end
    return y_MD.index_copy_(0, order, torch.cat(parts))


def weighted_sum(y_TKD: Tensor, weights_TK: Tensor, out_TD: Tensor | None = None) -> Tensor:
    """Same as ``experts.weighted_sum``."""
    if not computes(y_TKD.dtype):
        return reference.weighted_sum(y_TKD, weights_TK, out_TD)
    sum_TD, bits = made((y_TKD.shape[0], y_TKD.shape[2]), y_TKD.dtype)
    weigh_rows(array(y_TKD), array(weights_TK), bits)
    return sum_TD if out_TD is None else out_TD.copy_(sum_TD)


@njit(cache=True)
def weigh_rows(y_TKD, weights_TK, out_TD):
    share_out(_weigh_rows, len(y_TKD), (y_TKD, weights_TK, out_TD), out_TD.size <= ALONE)


@inner()
def _weigh_rows(begin, end, y_TKD, weights_TK, out_TD):
    for t in range(begin, end):
        _weigh(y_TKD[t], weights_TK[t], out_TD[t])


@inner()
def _weigh(y_KD, weights_K, out_D):
    """Compiled without fast math: the compiler's choices depend on strides; the bits must not."""
    sum_D = np.zeros(len(out_D), np.float32)
    for k in range(len(weights_K)):
        weight = weights_K[k]
        for d in range(len(out_D)):
            sum_D[d] += weight * widen(y_KD[k, d])
    for d in range(len(out_D)):
        out_D[d] = narrow(sum_D[d], out_D)
