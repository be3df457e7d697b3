"""Experts on a CPU: sorts pairs by slot, then computes two products per slot hit. ``expert_blocks``
does the same for weights in blocks.

N received tokens  M pairs  S slots  D hidden  F width  T own tokens  K choices per token
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from ..reference import experts as reference
from ..reference.experts import PLAIN_FORM, ExpertForm
from . import expert_blocks as cpu_expert_blocks
from .codegen.arrays import ALONE, FAST, array, computes, exp, inner, made, narrow, widen
from .codegen.threads import share_out
from .expert_blocks import ordered
from .linear import PackedSlots, linear
from .norm import silu_mul

# Up to this many pairs per slot hit, on average, the compiled product beats oneDNN's: with 32
# experts of 512 x 1024, of which 8 and 32 tokens choose 4, it took 1.1 and 3.2 ms against 2.2 and
# 3.7; with 64 tokens 6.5 against 4.7 (2 cores of an EPYC Turin; 1.1 is the memory limit). It knows
# neither biases nor any activation but silu.
_FEW = 4.5
_BLOCK = 64


def experts(
    x_ND: Tensor,
    rows_M: Tensor,
    slots_M: Tensor,
    w13_SFD: Tensor | PackedSlots,
    w2_SDF: Tensor | PackedSlots,
    counts_S: Tensor,
    form: ExpertForm = PLAIN_FORM,
) -> Tensor:
    """Same as ``experts.experts_reference``. The host reads the counts.

    A loop over the slots hit beats grouped and batched products on a CPU: ``torch._grouped_mm``
    over 32 experts took 4.4 ms however few the rows, and gathering weights for a batched product
    took 3 to 20 times as long as the loop (2 cores with AMX, torch 2.13).
    """
    if isinstance(w13_SFD, Tensor) and isinstance(w2_SDF, Tensor) and w13_SFD.dim() == 5:
        return cpu_expert_blocks.experts(x_ND, rows_M, slots_M, w13_SFD, w2_SDF, counts_S, form)
    order_M, ends_S, y_MD = ordered(x_ND, slots_M, counts_S)
    if not len(order_M):
        return y_MD
    plain = form.biases is None and form.activation.kind == "silu"
    few = plain and len(order_M) <= _FEW * np.count_nonzero(np.diff(ends_S, prepend=0))
    if few and isinstance(w13_SFD, PackedSlots) and isinstance(w2_SDF, PackedSlots):
        _few_rows(
            array(x_ND),
            array(rows_M),
            order_M,
            ends_S,
            array(w13_SFD.plain_SND),
            array(w2_SDF.plain_SND),
            array(y_MD),
        )
        return y_MD
    w13, w2 = (
        weights.packed if isinstance(weights, PackedSlots) else weights for weights in (w13_SFD, w2_SDF)
    )
    order = torch.from_numpy(order_M)
    x_MD = x_ND.index_select(0, rows_M.index_select(0, order))
    parts, start = [], 0
    for slot, end in enumerate(ends_S.tolist()):
        if end > start:
            up_bias, down_bias = form.of(slot)
            gate_up_NF = linear(x_MD[start:end], w13[slot], up_bias)
            inner_NF = silu_mul(gate_up_NF) if plain else reference.activate(gate_up_NF, form.activation)
            parts.append(linear(inner_NF, w2[slot], down_bias))
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


def _few_rows(x_ND, rows_M, order_M, ends_S, w13_SFD, w2_SDF, y_MD):
    """Both products for slots with few pairs, limited by reading the weights. Intermediate values
    stay float32.
    """
    num_pairs, width = len(order_M), w2_SDF.shape[2]
    x_MD, inner_MF = _gather(x_ND, rows_M, order_M), np.empty((num_pairs, 2 * width), np.float32)
    _product(x_MD, w13_SFD, ends_S, np.arange(num_pairs), inner_MF)
    _product(_silu_mul(inner_MF), w2_SDF, ends_S, order_M, y_MD)


@njit(cache=True)
def _gather(x_ND, rows_M, order_M):
    """The input rows of the pairs in order, as float32."""
    x_MD = np.empty((len(order_M), x_ND.shape[1]), np.float32)
    for m in range(len(order_M)):
        row = rows_M[order_M[m]]
        for d in range(x_ND.shape[1]):
            x_MD[m, d] = widen(x_ND[row, d])
    return x_MD


@njit(cache=True, error_model="numpy")  # a division that may raise is not vectorized
def _silu_mul(gate_up_MF):
    width = gate_up_MF.shape[1] // 2
    out_MF = np.empty((len(gate_up_MF), width), np.float32)
    for m in range(len(gate_up_MF)):
        for f in range(width):
            gate = gate_up_MF[m, f]
            out_MF[m, f] = gate / (np.float32(1) + exp(-gate)) * gate_up_MF[m, width + f]
    return out_MF


@njit(cache=True, forceinline=True)
def _product(x_MC, w_SRC, ends_S, places_M, out):
    """out[places_M[m]] = w[slot of pair m] @ x_MC[m]. A weight has R rows and C columns; each slot
    is cut into blocks of rows, so that threads share evenly.
    """
    num_rows = w_SRC.shape[1]
    starts_S = np.zeros(len(ends_S), np.int64)
    starts_S[1:] = ends_S[:-1]
    hit = np.nonzero(ends_S > starts_S)[0]
    blocks = (num_rows + _BLOCK - 1) // _BLOCK
    share_out(
        _product_blocks, len(hit) * blocks, (blocks, hit, x_MC, w_SRC, starts_S, ends_S, places_M, out), False
    )


@inner()
def _product_blocks(begin, end, blocks, hit, x_MC, w_SRC, starts_S, ends_S, places_M, out):
    num_rows = w_SRC.shape[1]
    for item in range(begin, end):
        slot, first = hit[item // blocks], item % blocks * _BLOCK
        for row in range(first, min(first + _BLOCK, num_rows)):
            for m in range(starts_S[slot], ends_S[slot], 4):
                _dots(w_SRC[slot, row], x_MC[m : min(m + 4, ends_S[slot])], places_M[m : m + 4], row, out)


@inner(fastmath=FAST)
def _dots(w_C, x_MC, places_M, row, out):
    """One weight row times up to four pairs. Reads and widens each weight once."""
    a = b = c = d = np.float32(0)
    num = len(x_MC)
    if num == 1:
        for i in range(len(w_C)):
            a += widen(w_C[i]) * x_MC[0, i]
    elif num == 2:
        for i in range(len(w_C)):
            weight = widen(w_C[i])
            a += weight * x_MC[0, i]
            b += weight * x_MC[1, i]
    elif num == 3:
        for i in range(len(w_C)):
            weight = widen(w_C[i])
            a += weight * x_MC[0, i]
            b += weight * x_MC[1, i]
            c += weight * x_MC[2, i]
    else:
        for i in range(len(w_C)):
            weight = widen(w_C[i])
            a += weight * x_MC[0, i]
            b += weight * x_MC[1, i]
            c += weight * x_MC[2, i]
            d += weight * x_MC[3, i]
    sums = (a, b, c, d)
    for m in range(num):
        out[places_M[m], row] = narrow(sums[m], out)
