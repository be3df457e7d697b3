"""Compiled RMS norm and SwiGLU product. The reference runs them as chains of five to eight kernels
for bf16.

There is one compiled form for any number of rows. A second form would sum in another order, and a
row's result must not depend on its neighbours.

N rows  D values of a row  F width
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from ..reference import norm
from .codegen.arrays import ALONE, FAST, array, computes, exp, inner, made, narrow, widen
from .codegen.threads import share_out


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Same as ``norm.rms_norm``. Rows may be strided, the values of a row may not."""
    if not (computes(x.dtype) and x.dtype == weight_D.dtype):
        return norm.rms_norm(x, weight_D, eps)
    out, bits = made(x.shape, x.dtype)
    norm_rows(_three(array(x)), array(weight_D), eps, _three(bits))
    return out


def add_rms_norm(x: Tensor, update: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Same as ``norm.add_rms_norm``."""
    if not (computes(x.dtype) and x.dtype == update.dtype == weight_D.dtype):
        return norm.add_rms_norm(x, update, weight_D, eps)
    total, total_bits = made(x.shape, x.dtype)
    out, bits = made(x.shape, x.dtype)
    add_norm_rows(
        _three(array(x)), _three(array(update)), array(weight_D), eps, _three(total_bits), _three(bits)
    )
    return total, out


def silu_mul(gate_up: Tensor) -> Tensor:
    """Same as ``norm.silu_mul``, but SiLU is not rounded before the product."""
    if not computes(gate_up.dtype):
        return norm.silu_mul(gate_up)
    out, bits = made((*gate_up.shape[:-1], gate_up.shape[-1] // 2), gate_up.dtype)
    _silu_mul(array(gate_up.reshape(-1, gate_up.shape[-1])), bits.reshape(-1, out.shape[-1]))
    return out


def _three(bits: NDArray[Any]) -> NDArray[Any]:
    """Views [..., D] as [A, B, D]: one compiled signature for hidden states and heads."""
    if bits.ndim == 3:
        return bits
    return bits[:, None] if bits.ndim == 2 else bits.reshape(-1, 1, bits.shape[-1])


@inner(forceinline=True)
def norm_row(x_D, weight_D, eps, out_D):
    """Products keep their order (no ``FAST``): the compiler multiplies one by one where ``out_D``
    lies less than some vectors behind the weights, and the bits must not depend on addresses.
    """
    factor = np.float32(1) / np.sqrt(_sum_of_squares(x_D) / np.float32(len(x_D)) + eps)
    for d in range(len(x_D)):
        out_D[d] = narrow(widen(x_D[d]) * factor * widen(weight_D[d]), out_D)


@inner(fastmath=FAST, forceinline=True)
def _sum_of_squares(x_D):
    total = np.float32(0)
    for d in range(len(x_D)):
        value = widen(x_D[d])
        total += value * value
    return total


@inner()
def _add_row(x_D, update_D, total_D):
    for d in range(len(x_D)):
        total_D[d] = narrow(widen(x_D[d]) + widen(update_D[d]), total_D)


@inner(error_model="numpy")  # a division that may raise is not vectorized
def _silu_mul_row(gate_up_F, out_F):
    width = len(out_F)
    for f in range(width):
        gate = widen(gate_up_F[f])
        out_F[f] = narrow(gate / (np.float32(1) + exp(-gate)) * widen(gate_up_F[width + f]), out_F)


@njit(cache=True, forceinline=True)
def norm_rows(x, weight_D, eps, out):
    share_out(_norm, len(x), (x, weight_D, np.float32(eps), out), out.size <= ALONE)


@inner()
def _norm(begin, end, x, weight_D, eps, out):
    for n in range(begin, end):
        for b in range(x.shape[1]):
            norm_row(x[n, b], weight_D, eps, out[n, b])


@njit(cache=True, forceinline=True)
def add_norm_rows(x, update, weight_D, eps, total, out):
    share_out(_add_norm, len(x), (x, update, weight_D, np.float32(eps), total, out), out.size <= ALONE)


@inner()
def _add_norm(begin, end, x, update, weight_D, eps, total, out):
    for n in range(begin, end):
        for b in range(x.shape[1]):
            _add_row(x[n, b], update[n, b], total[n, b])
            norm_row(total[n, b], weight_D, eps, out[n, b])


@njit(cache=True)
def _silu_mul(gate_up_NF, out_NF):
    share_out(_silu_mul_rows, len(out_NF), (gate_up_NF, out_NF), out_NF.size <= ALONE)


@inner()
def _silu_mul_rows(begin, end, gate_up_NF, out_NF):
    for n in range(begin, end):
        _silu_mul_row(gate_up_NF[n], out_NF[n])
