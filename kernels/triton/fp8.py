"""Triton column of the row ops of ``fp8``: quantises rows directly, after a norm (with a residual),
and after SiLU times up.

Roofline: memory, 2 bytes read and 1 + 4 / 128 written per value in bf16; 2 more read and written
for the residual.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats.fp8_format import BLOCK
from ..reference.fp8 import LARGEST, LEAST_SCALE, NormedRows, Quantised
from .norm import rows_together, warps_for
from .target import check_dtype, interpreted, power_of_two

# Kernels can only use globals that are Triton constants.
_LARGEST = tl.constexpr(LARGEST)
_LEAST_SCALE = tl.constexpr(LEAST_SCALE)


def quantise_rows(x_ND: Tensor) -> Quantised:
    """Same as ``fp8.quantise_rows``."""
    return _rows(x_ND, None, None, 0.0)[2]


def rms_norm_fp8(x_ND: Tensor, weight_D: Tensor, eps: float) -> Quantised:
    """Same as ``fp8.rms_norm_fp8``."""
    return _rows(x_ND, None, weight_D, eps)[2]


def add_rms_norm_fp8(
    x_ND: Tensor, update_ND: Tensor, weight_D: Tensor, eps: float
) -> tuple[Tensor, Quantised]:
    """Same as ``fp8.add_rms_norm_fp8``."""
    assert x_ND.shape == update_ND.shape and x_ND.dtype == update_ND.dtype
    total_ND, _, rows = _rows(x_ND, update_ND, weight_D, eps)
    return total_ND, rows


def norm_rows(
    x_ND: Tensor, update_ND: Tensor | None, weight_D: Tensor, eps: float
) -> tuple[Tensor, NormedRows]:
    """The sum, and its norm in x's dtype and quantised."""
    total_ND, normed_ND, rows = _rows(x_ND, update_ND, weight_D, eps, keep=True)
    return total_ND, NormedRows(normed_ND, rows)


def silu_mul_fp8(gate_up_NF: Tensor) -> Quantised:
    """Same as ``fp8.silu_mul_fp8``."""
    check_dtype(gate_up_NF, "silu_mul_fp8: x")
    assert gate_up_NF.stride(1) == 1
    num_rows, width = len(gate_up_NF), gate_up_NF.shape[1] // 2
    out = _empty(num_rows, width, gate_up_NF.device)
    groups = out.scales.shape[1]
    if num_rows and width:
        _silu_mul_fp8_kernel[(num_rows, triton.cdiv(groups, 8))](
            gate_up_NF,
            gate_up_NF.stride(0),
            out.values,
            out.scales,
            width,
            groups,
            GROUPS=min(8, power_of_two(groups)),
            ROUND=interpreted(),
            num_warps=4,
        )
    return out


def _rows(
    x_ND: Tensor, update_ND: Tensor | None, weight_D: Tensor | None, eps: float, keep: bool = False
) -> tuple[Tensor, Tensor, Quantised]:
    """The sum, its norm if ``keep``, else x, and the quantised rows."""
    check_dtype(x_ND, "fp8: x")
    assert x_ND.stride(1) == 1 and (update_ND is None or update_ND.stride(1) == 1)
    num_rows, dim = x_ND.shape
    out = _empty(num_rows, dim, x_ND.device)
    total_ND = x_ND.new_empty(x_ND.shape) if update_ND is not None else x_ND
    normed_ND = x_ND.new_empty(x_ND.shape) if keep else x_ND
    groups = out.scales.shape[1]
    if num_rows and dim:
        dim_pad = max(BLOCK, power_of_two(dim))
        together = rows_together(dim_pad)
        _quantise_kernel[(triton.cdiv(num_rows, together),)](
            x_ND,
            update_ND if update_ND is not None else x_ND,
            weight_D if weight_D is not None else x_ND,
            total_ND,
            normed_ND,
            out.values,
            out.scales,
            num_rows,
            x_ND.stride(0),
            update_ND.stride(0) if update_ND is not None else 0,
            eps,
            D=dim,
            D_PAD=dim_pad,
            ROWS=together,
            GROUPS=groups,
            ADD=update_ND is not None,
            NORM=weight_D is not None,
            KEEP=keep,
            ROUND=interpreted(),
            num_warps=warps_for(dim_pad),
        )
    return total_ND, normed_ND, out


def _empty(num_rows: int, dim: int, device: torch.device) -> Quantised:
    values = torch.empty(num_rows, dim, dtype=torch.float8_e4m3fn, device=device)
    return Quantised(values, torch.empty(num_rows, -(-dim // BLOCK), dtype=torch.float32, device=device))


@triton.jit
def group_scales(x):
    """Scales [R] of x [R, 128] float32."""
    return tl.maximum(tl.max(tl.abs(x), 1) / _LARGEST, _LEAST_SCALE)


@triton.jit
def eight_bits(x, dtype: tl.constexpr, ROUND: tl.constexpr):
    """x float32 as e4m3. The interpreter (3.7.1) drops the carry when it rounds, so there x is
    first rounded to a value of e4m3: three bits of mantissa, or multiples of 2^-9 below 2^-6.
    """
    if ROUND:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
        x = tl.where(tl.abs(x) < 0.015625, (x + 24576.0) - 24576.0, bits.to(tl.float32, bitcast=True))
    return x.to(dtype)


@triton.jit(do_not_specialize=["num_rows"])
def _quantise_kernel(
    x_ptr,
    update_ptr,
    weight_ptr,
    total_ptr,
    normed_ptr,
    values_ptr,
    scales_ptr,
    num_rows,
    x_stride,
    update_stride,
    eps,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    ADD: tl.constexpr,
    NORM: tl.constexpr,
    KEEP: tl.constexpr,
    ROUND: tl.constexpr,
):
    """Rows are summed as by ``norm``, and a norm is rounded as there: the bits are those of both
    ops.
    """
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    d = tl.arange(0, D_PAD)[None, :]
    inside = (row < num_rows) & (d < D)
    dtype: tl.constexpr = total_ptr.dtype.element_ty
    x = tl.load(x_ptr + row * x_stride + d, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(update_ptr + row * update_stride + d, mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(dtype)
        tl.store(total_ptr + row * D + d, rounded, mask=inside)
        x = rounded.to(tl.float32)
    if NORM:
        scale = 1.0 / tl.sqrt(tl.sum(x * x, 1) / D + eps)
        weight = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)
        normed = (x * scale[:, None] * weight).to(dtype)
        if KEEP:
            tl.store(normed_ptr + row * D + d, normed, mask=inside)
        x = normed.to(tl.float32)
    groups = tl.reshape(x, (ROWS * (D_PAD // 128), 128))
    scales = group_scales(groups)
    eight = eight_bits(groups / scales[:, None], values_ptr.dtype.element_ty, ROUND)
    tl.store(values_ptr + row * D + d, tl.reshape(eight, (ROWS, D_PAD)), mask=inside)
    group = tl.arange(0, D_PAD // 128)[None, :]
    at = scales_ptr + row * GROUPS + group
    tl.store(at, tl.reshape(scales, (ROWS, D_PAD // 128)), mask=(row < num_rows) & (group < GROUPS))


@triton.jit
def _silu_mul_fp8_kernel(
    x_ptr, x_stride, values_ptr, scales_ptr, F, num_groups, GROUPS: tl.constexpr, ROUND: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    f = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    gate = tl.load(x_ptr + row * x_stride + f, mask=f < F, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * x_stride + F + f, mask=f < F, other=0.0).to(tl.float32)
    h = gate / (1.0 + tl.exp(-gate)) * up
    scales = group_scales(h)
    tl.store(
        values_ptr + row * F + f,
        eight_bits(h / scales[:, None], values_ptr.dtype.element_ty, ROUND),
        mask=f < F,
    )
    tl.store(scales_ptr + row * num_groups + group, scales, mask=group < num_groups)
