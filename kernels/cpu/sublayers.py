"""Sublayers on a CPU: where weights are packed in blocks, each is one compiled call. It is made of
the same compiled functions as the single ops, so a row's result is the same to the bit.

A call costs 5 to 20 us of Python, more when weights that stream through have driven its code out of
the caches, and meanwhile the other threads are idle. One row through 8 layers of 32 experts took
0.5 to 0.9 ms less, of 4.2 to 5.2, than by single ops (2 cores of an EPYC Turin).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from ..cpu_isa import COLUMNS
from ..reference.experts import ExpertForm
from ..reference.fp8 import Normed
from ..reference.kv_entries import holds_fp8, num_kv_heads
from ..reference.paged import PagedBatch
from ..reference.rope import Angles
from ..reference.sublayers import (
    AttentionSublayer,
    ExpertsSublayer,
    GateWeights,
    GroupedHeads,
    LocalExperts,
    Projection,
    Residual,
    RowNorm,
)
from .attention import Shape, attend_heads, reach_of
from .codegen.arrays import array, computes, inner, matrix
from .codegen.blocks import multiply_slots
from .codegen.crew import num_threads
from .expert_blocks import run_experts
from .expert_form import form_of
from .experts import weigh_rows
from .gate import route, rule_of
from .kv_entries import place_of_heads
from .norm import add_norm_rows, norm_rows
from .rope import enter_heads
from .views import angles_of, rows_of, writes_of

_BF16 = np.empty(0, np.uint16)
_FLOAT32 = np.empty(0, np.float32)
_NO_ROWS = np.empty((0, 0), np.uint16)


def attention_in_blocks(norm: RowNorm, heads: GroupedHeads) -> bool:
    """Whether ``Attention`` takes these weights."""
    return norm.weight.dtype == torch.bfloat16 and heads.qkv.weight.dim() == heads.out.weight.dim() == 4


def experts_in_blocks(norm: RowNorm, weights: tuple[Tensor, Tensor]) -> bool:
    """Whether ``Experts`` takes these weights."""
    w13 = weights[0]
    return norm.weight.dtype == torch.bfloat16 and isinstance(w13, Tensor) and w13.dim() == 5


class _Caches(NamedTuple):
    """A layer's keys and values as the compiled call takes them."""

    arrays: tuple[NDArray[Any], NDArray[Any]]
    place: Any
    num_heads: int
    like: NDArray[Any]


def _caches(keys: Tensor, values: Tensor, dim: int) -> _Caches | None:
    """None if compiled calls do not take them."""
    if keys.dtype != values.dtype or not (holds_fp8(keys) or computes(keys.dtype)):
        return None
    like = _FLOAT32 if keys.dtype == torch.float32 else _BF16
    return _Caches((array(keys), array(values)), place_of_heads(keys, dim), num_kv_heads(keys, dim), like)


class Attention:
    """The attention of a layer. Arrays over its weights are made once: finding one takes 1 to 2 us.
    ``composed`` takes the steps whose rows or caches are of other types.
    """

    def __init__(self, norm: RowNorm, heads: GroupedHeads, composed: AttentionSublayer) -> None:
        self._composed = composed
        self._kept_alive = heads  # the compiled call gets addresses of weights
        self._dim = heads.dim
        self._interleaved = heads.interleaved
        self._norm = array(norm.weight), norm.eps
        self._head_norms = _head_norms(heads)
        self._qkv = _blocks(heads.qkv)
        self._out = _blocks(heads.out)
        self._factor = heads.dim**-0.5 / math.log(2)
        self._window, self._sinks = reach_of(heads.rule)
        # Those of the last call: a layer keeps its cache for as long as the pool stands.
        self._cache: tuple[Tensor, Tensor] | tuple[None, None] = None, None
        self._caches: _Caches | None = None

    def __call__(
        self, residual: Residual, rotation: Angles, batch: PagedBatch, cache: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        keys, values = cache
        if keys is not self._cache[0] or values is not self._cache[1]:
            self._cache, self._caches = cache, _caches(keys, values, self._dim)
        caches = self._caches
        if caches is None or not _plain(residual):
            return self._composed(residual, rotation, batch, cache)
        total_TD, rows = _rows(residual, *self._norm)
        out_TD = torch.empty_like(total_TD)
        shape = Shape(caches.num_heads, batch.num_decode, batch.page_size, num_threads(), self._window)
        entering = self._head_norms, angles_of(rotation), writes_of(batch), self._interleaved
        attending = (
            caches.arrays,
            caches.place,
            rows_of(batch),
            shape,
            self._factor,
            caches.like,
            self._sinks,
        )
        _attention(rows, self._dim, self._qkv, entering, attending, self._out, out_TD.data_ptr())
        return total_TD, out_TD


class Experts:
    """The routed experts of a layer. ``composed`` takes the steps whose rows are of other types."""

    def __init__(
        self,
        norm: RowNorm,
        gate: GateWeights,
        weights: tuple[Tensor, Tensor],
        form: ExpertForm,
        composed: ExpertsSublayer,
    ) -> None:
        w13, w2 = weights
        bias = _FLOAT32 if gate.bias is None else array(gate.bias)
        self._composed = composed
        self._kept_alive = weights  # the compiled call gets their addresses
        self._norm = array(norm.weight), norm.eps
        self._routing = array(gate.weight), bias, *rule_of(gate.routing), gate.routing.top_k
        self._blocks = w13.data_ptr(), w2.data_ptr(), 2 * w2.shape[2]
        self._form = form_of(form, torch.bfloat16)
        # The places of the last step: they change with its number of tokens.
        self._local: LocalExperts | None = None
        self._places: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]

    def __call__(self, residual: Residual, local: LocalExperts) -> tuple[Tensor, Normed, Tensor]:
        if not _plain(residual):
            return self._composed(residual, local)
        if self._local is not local:
            self._local = local
            self._places = array(local.slots_L), array(local.rows_M), array(local.counts_S)
        total_TD, rows = _rows(residual, *self._norm)
        normed_TD = torch.empty_like(total_TD)
        out_TD = torch.empty_like(total_TD)
        given = normed_TD.data_ptr(), out_TD.data_ptr()
        weights = self._blocks, self._form
        _experts(rows, self._routing, self._places, weights, given, num_threads())
        return total_TD, normed_TD, out_TD


def _plain(residual: Residual) -> bool:
    """Whether the compiled calls take these rows."""
    x_TD, update_TD = residual
    same = x_TD.dtype == torch.bfloat16 and x_TD.is_contiguous()
    return same and (update_TD is None or (update_TD.dtype == torch.bfloat16 and update_TD.is_contiguous()))


def _rows(residual: Residual, weight_D: NDArray[Any], eps: float) -> tuple[Tensor, Any]:
    """The sum, and the arguments with which ``_add_norm`` computes it."""
    x_TD, update_TD = residual
    shape, x = x_TD.shape, x_TD.data_ptr()
    if update_TD is None:
        return x_TD, (x, 0, weight_D, eps, x, shape[0], shape[1])
    total_TD = torch.empty_like(x_TD)
    return total_TD, (x, update_TD.data_ptr(), weight_D, eps, total_TD.data_ptr(), shape[0], shape[1])


def _blocks(projection: Projection) -> tuple[int, int, NDArray[Any]]:
    """The address of packed weights, their columns, and the bias [1, N], or empty."""
    bias = _NO_ROWS if projection.bias is None else array(projection.bias.view(1, -1))
    return projection.weight.data_ptr(), COLUMNS * len(projection.weight), bias


def _head_norms(heads: GroupedHeads) -> tuple[NDArray[Any], NDArray[Any], float]:
    norms = heads.norms
    return (_BF16, _BF16, 0.0) if norms is None else (array(norms.q_D), array(norms.k_D), norms.eps)


@inner()
def _add_norm(rows, normed_TD):
    x, update, weight_D, eps, total, num_tokens, hidden = rows
    shape = (num_tokens, 1, hidden)  # as ``norm`` passes rows
    x_T1D = matrix(x, num_tokens, hidden).reshape(shape)
    normed_T1D = normed_TD.reshape(shape)
    if update:
        update_T1D = matrix(update, num_tokens, hidden).reshape(shape)
        total_T1D = matrix(total, num_tokens, hidden).reshape(shape)
        add_norm_rows(x_T1D, update_T1D, weight_D, eps, total_T1D, normed_T1D)
    else:
        norm_rows(x_T1D, weight_D, eps, normed_T1D)


@inner()
def _multiply(x_TC, blocks, y_TN, num_threads):
    num_inner, ends_S = x_TC.shape[1], np.full(1, len(x_TC))
    multiply_slots(
        np.int64(x_TC.ctypes.data),
        2 * num_inner,
        blocks[0],
        num_inner // 2,
        (ends_S[:0], ends_S[:0], ends_S),
        blocks[2],
        y_TN,
        num_threads,
    )


@njit(cache=True)
def _attention(rows, dim, qkv, entering, attending, out, result):
    (norms, turns, write_T, interleaved), (caches, place, batch, shape, factor, like, sinks_H) = (
        entering,
        attending,
    )
    num_tokens, hidden, num_heads = rows[5], rows[6], qkv[1] // dim
    normed_TD = np.empty((num_tokens, hidden), np.uint16)
    qkv_TN = np.empty((num_tokens, qkv[1]), np.uint16)
    _add_norm(rows, normed_TD)
    _multiply(normed_TD, qkv, qkv_TN, shape.num_threads)
    qkv_TXE = qkv_TN.reshape(num_tokens, num_heads, dim)
    q_THE = np.empty((num_tokens, num_heads - 2 * shape.num_heads, dim), np.uint16)
    enter_heads(qkv_TXE, norms[:2], norms[2], turns, caches, write_T, interleaved, q_THE)
    seen_THE = np.empty_like(q_THE)
    attend_heads(q_THE, caches[0], caches[1], place, place, batch, shape, factor, like, seen_THE, sinks_H)
    out_TD = matrix(result, num_tokens, out[1])
    _multiply(seen_THE.reshape(num_tokens, -1), out, out_TD, shape.num_threads)


@njit(cache=True)
def _experts(rows, routing, places, weights, results, num_threads):
    """``weights``: addresses of packed w13 and w2, and F; the form. ``results``: addresses of the
    normed rows and of the output.
    """
    blocks, form = weights
    (weight_LD, bias_L, groups, rule, top_k), (slots_L, rows_M, counts_S), (w13, w2, width) = (
        routing,
        places,
        blocks,
    )
    num_tokens, hidden = rows[5], rows[6]
    normed_TD = matrix(results[0], num_tokens, hidden)
    out_TD = matrix(results[1], num_tokens, hidden)
    _add_norm(rows, normed_TD)
    ids_TC = np.empty((num_tokens, top_k), np.int64)
    weights_TC = np.empty((num_tokens, top_k), np.float32)
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
        form,
        num_threads,
    )
    y_TCD = y_MD.reshape(num_tokens, top_k, hidden)
    weigh_rows(y_TCD, weights_TC, out_TD)
