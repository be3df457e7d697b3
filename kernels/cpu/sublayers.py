"""Sublayers on a CPU: where weights are packed in blocks, each is one compiled call, made of the
same compiled functions as the single ops: a row's result is the same to the bit.

A call costs 5 to 20 us of Python, more when weights that stream through have driven its code out of
the caches, and meanwhile the other threads have nothing to do. One row through 8 layers of 32
experts took 0.5 to 0.9 ms less, of 4.2 to 5.2, than by single ops (2 cores of an EPYC Turin).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from ..cpu_isa import COLUMNS
from ..reference import sublayers
from ..reference.kv_entries import holds_fp8, num_kv_heads
from ..reference.sublayers import GateWeights, GroupedHeads, Here, Ops, Projection, Residual, RowNorm, Step
from .attention import Shape, attend_heads
from .codegen.arrays import array, computes, inner, made
from .codegen.blocks import multiply_rows
from .expert_blocks import run_experts
from .experts import weigh_rows
from .gate import route, rule_of
from .kv_entries import place_of_heads
from .norm import add_norm_rows, norm_rows
from .rope import enter_heads

_BF16, _FLOAT32, _NO_ROWS = np.empty(0, np.uint16), np.empty(0, np.float32), np.empty((0, 0), np.uint16)


def attention_sublayer(
    ops: Ops, residual: Residual, norm: RowNorm, heads: GroupedHeads, step: Step
) -> tuple[Tensor, Tensor]:
    """As ``sublayers.attention_sublayer``."""
    keys, values = step.cache
    kept = keys.dtype == values.dtype and (holds_fp8(keys) or computes(keys.dtype))
    if not (kept and heads.qkv.weight.dim() == heads.out.weight.dim() == 4 and _plain(residual, norm)):
        return sublayers.attention_sublayer(ops, residual, norm, heads, step)
    total_TD, rows = _rows(residual, norm)
    batch, num_tokens = step.batch, len(total_TD)
    out_TD, out = made((num_tokens, COLUMNS * len(heads.out.weight)), torch.bfloat16)
    place, num_keys = place_of_heads(keys, heads.dim), num_kv_heads(keys, heads.dim)
    shape = Shape(num_keys, batch.num_decode, batch.page_size, numba.get_num_threads())
    like = _FLOAT32 if keys.dtype == torch.float32 else _BF16
    entering = _head_norms(heads), step.rotation.arrays, batch.write_T.numpy(), heads.interleaved
    attending = (array(keys), array(values)), place, batch.arrays, shape, heads.dim**-0.5 / math.log(2), like
    _attention(rows, heads.dim, _blocks(heads.qkv), entering, attending, _blocks(heads.out), out)
    return total_TD, out_TD


def experts_sublayer(
    ops: Ops, residual: Residual, norm: RowNorm, gate: GateWeights, weights: tuple[Any, Any], here: Here
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``sublayers.experts_sublayer``."""
    w13, w2 = weights
    if not (isinstance(w13, Tensor) and w13.dim() == 5 and _plain(residual, norm)):
        return sublayers.experts_sublayer(ops, residual, norm, gate, weights, here)
    total_TD, rows = _rows(residual, norm)
    (normed_TD, normed), (out_TD, out) = (
        made(total_TD.shape, torch.bfloat16),
        made(total_TD.shape, torch.bfloat16),
    )
    weight, bias = gate.arrays
    routing = weight, _FLOAT32 if bias is None else bias, *rule_of(gate.routing), gate.routing.top_k
    blocks = w13.data_ptr(), w2.data_ptr(), 2 * w2.shape[2]
    _experts(rows, routing, here.arrays, blocks, normed, out, numba.get_num_threads())
    return total_TD, normed_TD, out_TD


def _plain(residual: Residual, norm: RowNorm) -> bool:
    """Whether the compiled calls take these rows."""
    x_TD, update_TD = residual
    same = x_TD.dtype == norm.weight.dtype == torch.bfloat16 and x_TD.is_contiguous()
    return same and (update_TD is None or (update_TD.dtype == torch.bfloat16 and update_TD.is_contiguous()))


def _rows(residual: Residual, norm: RowNorm) -> tuple[Tensor, Any]:
    """The sum, yet to be computed unless it is there; and all that ``_add_norm`` needs for it."""
    x_TD, update_TD = residual
    x, weight = array(x_TD), norm.array
    if update_TD is None:
        return x_TD, (x, _NO_ROWS, weight, norm.eps, x)
    total_TD, total = made(x_TD.shape, torch.bfloat16)
    return total_TD, (x, array(update_TD), weight, norm.eps, total)


def _blocks(projection: Projection) -> tuple[int, int, NDArray[Any]]:
    """The address of packed weights, their columns, and the bias."""
    bias = _BF16 if projection.bias is None else array(projection.bias)
    return projection.weight.data_ptr(), COLUMNS * len(projection.weight), bias


def _head_norms(heads: GroupedHeads) -> tuple[NDArray[Any], NDArray[Any], float]:
    arrays = heads.norm_arrays
    return (_BF16, _BF16, 0.0) if heads.norms is None or arrays is None else (*arrays, heads.norms.eps)


@inner()
def _add_norm(rows, normed_TD):
    x_TD, update_TD, weight_D, eps, total_TD = rows
    shape = (len(x_TD), 1, x_TD.shape[1])  # as ``cpu_norm`` passes rows
    x, total, normed = x_TD.reshape(shape), total_TD.reshape(shape), normed_TD.reshape(shape)
    if len(update_TD):
        add_norm_rows(x, update_TD.reshape(shape), weight_D, eps, total, normed)
    else:
        norm_rows(x, weight_D, eps, normed)


@inner()
def _multiply(x_TC, blocks, y_TN, num_threads):
    multiply_rows(
        np.int64(x_TC.ctypes.data), 2 * x_TC.shape[1], blocks[0], x_TC.shape[1], blocks[2], y_TN, num_threads
    )


@njit(cache=True)
def _attention(rows, dim, qkv, entering, attending, out, out_TD):
    (norms, turns, write_T, interleaved), (caches, place, batch, shape, factor, like) = entering, attending
    num_tokens, num_heads = len(rows[0]), qkv[1] // dim
    normed_TD, qkv_TN = np.empty_like(rows[0]), np.empty((num_tokens, qkv[1]), np.uint16)
    _add_norm(rows, normed_TD)
    _multiply(normed_TD, qkv, qkv_TN, shape.num_threads)
    qkv_TXE = qkv_TN.reshape(num_tokens, num_heads, dim)
    q_THE = np.empty((num_tokens, num_heads - 2 * shape.num_heads, dim), np.uint16)
    enter_heads(qkv_TXE, norms[:2], norms[2], turns, caches, write_T, interleaved, q_THE)
    seen_THE = np.empty_like(q_THE)
    attend_heads(q_THE, caches[0], caches[1], place, place, batch, shape, factor, like, seen_THE)
    _multiply(seen_THE.reshape(num_tokens, -1), out, out_TD, shape.num_threads)


@njit(cache=True)
def _experts(rows, routing, places, blocks, normed_TD, out_TD, num_threads):
    """``blocks``: addresses of packed w13 and w2, and F."""
    (weight_LD, bias_L, groups, rule, top_k), (slots_L, rows_M, counts_S), (w13, w2, width) = (
        routing,
        places,
        blocks,
    )
    num_tokens, hidden = out_TD.shape
    _add_norm(rows, normed_TD)
    ids_TC, weights_TC = np.empty((num_tokens, top_k), np.int64), np.empty((num_tokens, top_k), np.float32)
    route(normed_TD, weight_LD, bias_L, groups, rule, ids_TC, weights_TC)
    slots_M = slots_L[ids_TC.reshape(-1)]
    y_MD = np.empty((len(slots_M), hidden), np.uint16)
    run_experts(
        np.int64(normed_TD.ctypes.data),
        2 * hidden,
        w13,
        w2,
        width,
        rows_M,
        slots_M,
        counts_S,
        y_MD,
        num_threads,
    )
    y_TCD = y_MD.reshape(num_tokens, top_k, hidden)
    weigh_rows(y_TCD, weights_TC, out_TD)
