"""Triton column of ``norm``.

Roofline: memory. ``rms_norm`` reads and writes each value once, ``add_rms_norm`` reads two and
writes two, ``silu_mul`` reads two and writes one.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .target import check_dtype, power_of_two

# Values per program: short rows (heads) share a program.
_TILE = 4096


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Same as ``norm.rms_norm``, for x [..., D] whose rows lie at regular distances (a slice of a
    wider matrix is read in place).
    """
    return _launch(x, None, weight_D, eps)[0]


def add_rms_norm(x: Tensor, update: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Same as ``norm.add_rms_norm``."""
    assert x.shape == update.shape and x.dtype == update.dtype
    normed, total = _launch(x, update, weight_D, eps)
    return total, normed


def silu_mul(gate_up: Tensor) -> Tensor:
    """Same as ``norm.silu_mul``."""
    check_dtype(gate_up, "silu_mul: x")
    width = gate_up.shape[-1] // 2
    rows = gate_up.reshape(-1, 2 * width)
    out = gate_up.new_empty(*gate_up.shape[:-1], width)
    if out.numel():
        columns = min(2048, power_of_two(width))
        _silu_mul_kernel[(len(rows), triton.cdiv(width, columns))](
            rows, rows.stride(0), out, width, COLUMNS=columns, num_warps=4
        )
    return out


def _launch(x: Tensor, update: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    check_dtype(x, "rms_norm: x")
    dim = x.shape[-1]
    rows = _as_heads(x)
    added = _as_heads(update if update is not None else x)
    num_rows, heads = rows.shape[0] * rows.shape[1], rows.shape[1]
    normed = x.new_empty(x.shape)
    total = x.new_empty(x.shape) if update is not None else normed
    if normed.numel():
        dim_pad = power_of_two(dim)
        tile_rows = rows_together(dim_pad)
        _rms_norm_kernel[(triton.cdiv(num_rows, tile_rows),)](
            rows,
            added,
            weight_D,
            normed,
            total,
            num_rows,
            heads,
            rows.stride(0),
            rows.stride(1),
            added.stride(0),
            added.stride(1),
            eps,
            D=dim,
            D_PAD=dim_pad,
            ROWS=tile_rows,
            ADD=update is not None,
            num_warps=warps_for(dim_pad),
        )
    return normed, total


def rows_together(dim_pad: int) -> int:
    """Rows of a program that norms them."""
    return max(1, _TILE // dim_pad)


def warps_for(dim_pad: int) -> int:
    """Its warps. With both a row is summed in one order, whatever becomes of its norm."""
    return 8 if dim_pad >= 4096 else 4


def _as_heads(x: Tensor) -> Tensor:
    """Views x as [T, H, D] with two strides, without a copy if the layout allows it."""
    if x.dim() != 3:
        x = x.reshape(-1, 1, x.shape[-1])
    return x if x.stride(2) == 1 else x.contiguous()


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm_kernel(
    x_ptr,
    update_ptr,
    weight_ptr,
    normed_ptr,
    total_ptr,
    num_rows,
    heads,
    x_stride_t,
    x_stride_h,
    update_stride_t,
    update_stride_h,
    eps,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    ADD: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    d = tl.arange(0, D_PAD)[None, :]
    inside = (row < num_rows) & (d < D)
    token, head = row // heads, row % heads
    x = tl.load(x_ptr + token * x_stride_t + head * x_stride_h + d, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(
            update_ptr + token * update_stride_t + head * update_stride_h + d, mask=inside, other=0.0
        ).to(tl.float32)
        rounded = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + row * D + d, rounded, mask=inside)
        x = rounded.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, 1) / D + eps)
    weight = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(
        normed_ptr + row * D + d, (x * scale[:, None] * weight).to(normed_ptr.dtype.element_ty), mask=inside
    )


@triton.jit
def _silu_mul_kernel(x_ptr, x_stride, out_ptr, F, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    gate = tl.load(x_ptr + row * x_stride + f, mask=f < F, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * x_stride + F + f, mask=f < F, other=0.0).to(tl.float32)
    tl.store(
        out_ptr + row * F + f, (gate / (1.0 + tl.exp(-gate)) * up).to(out_ptr.dtype.element_ty), mask=f < F
    )
