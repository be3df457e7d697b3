"""Triton column of ``fp8.linear_fp8``: a product of rows with a matrix in block-scaled FP8.

A step of 128 along the inner dim has one scale per row and one per block of the matrix, as in
``experts_fp8.py``. Few rows are quantised by every program that reads them, which saves a launch
where launches are the cost; many rows are quantised once beforehand. Roofline: the bytes of the
matrix for few rows, the FP8 rate of the matrix units for many.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats.fp8_format import BLOCK
from ..reference.fp8 import Quantised
from ..reference.sublayers import Product, Projection, Residual, RowNorm
from .experts import block_and_tile
from .fp8 import add_rms_norm_fp8, eight_bits, group_scales, quantise_rows, rms_norm_fp8
from .target import check_dtype, interpreted
from .tiles import DEFAULT, Tiles

QUANTISED_HERE = 64
"""Up to so many rows are quantised by the product itself."""


def linear_fp8(
    x: Tensor,
    weight_ND: Tensor,
    bias_N: Tensor | None,
    scales_GG: Tensor,
    product_of_many: Product | None = None,
    tiles: Tiles = DEFAULT,
) -> Tensor:
    """Same as ``fp8.linear_fp8``. The host reads nothing. ``product_of_many``: of more rows than
    are quantised by the product; ours, with ``tiles``, unless given.
    """
    num_columns, dim = weight_ND.shape
    x_TD = x.reshape(-1, dim)
    check_dtype(x_TD, "linear_fp8: x")
    assert x_TD.stride(1) == 1
    few = len(x_TD) <= QUANTISED_HERE
    rows = Quantised(x_TD, scales_GG) if few else quantise_rows(x_TD)
    projection = Projection(weight_ND, bias_N, scales_GG)
    if few or product_of_many is None:
        y_TN = product(rows, projection, x.dtype, tiles)
    else:
        y_TN = product_of_many(rows, projection, x.dtype)
    return y_TN.view(*x.shape[:-1], num_columns)


def norm_linear_fp8(
    residual: Residual, norm: RowNorm, projection: Projection, product_of_many: Product
) -> tuple[Tensor, Tensor]:
    """The sum of the residual [T, D], and the product of its norm with a projection in FP8. The
    norm is quantised as it is computed: for many rows, which would be quantised by a launch of
    their own. The bits are the same.
    """
    x_TD, update_TD = residual
    if update_TD is None:
        rows = rms_norm_fp8(x_TD, norm.weight, norm.eps)
    else:
        x_TD, rows = add_rms_norm_fp8(x_TD, update_TD, norm.weight, norm.eps)
    return x_TD, product_of_many(rows, projection, x_TD.dtype)


def product(rows: Quantised, projection: Projection, dtype: torch.dtype, tiles: Tiles = DEFAULT) -> Tensor:
    """y_TN. Up to ``QUANTISED_HERE`` rows have values that are still to be quantised."""
    weight_ND, bias_N, scales_GG = projection.weight, projection.bias, projection.scales
    assert scales_GG is not None and weight_ND.is_contiguous() and scales_GG.is_contiguous()
    (num_rows, dim), num_columns = rows.values.shape, len(weight_ND)
    few = num_rows <= QUANTISED_HERE
    y = torch.empty(num_rows, num_columns, dtype=dtype, device=weight_ND.device)
    if not num_rows:
        return y
    tile = tiles.of_linear_fp8(num_rows)
    num_blocks = triton.cdiv(num_rows, tile.rows)
    _linear_fp8_kernel[(num_blocks * triton.cdiv(num_columns, tile.columns),)](
        rows.values,
        rows.scales,
        weight_ND,
        scales_GG,
        bias_N if bias_N is not None else weight_ND,
        y,
        num_rows,
        num_blocks,
        rows.values.stride(0),
        D=dim,
        N=num_columns,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.columns,
        EVEN=dim % BLOCK == num_columns % BLOCK == 0,
        WIDE=few,
        BIAS=bias_N is not None,
        ROUND=interpreted(),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return y


@triton.jit(do_not_specialize=["num_rows", "num_blocks"])
def _linear_fp8_kernel(
    x_ptr,
    x_scales_ptr,
    w_ptr,
    w_scales_ptr,
    bias_ptr,
    y_ptr,
    num_rows,
    num_blocks,
    x_stride,
    D: tl.constexpr,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    BIAS: tl.constexpr,
    ROUND: tl.constexpr,
):
    """BLOCK_M rows and BLOCK_N columns; BLOCK_N divides 128. ``WIDE``: x is still to be
    quantised.
    """
    GROUPS: tl.constexpr = (D + 127) // 128
    block, tile = block_and_tile(num_blocks, tl.cdiv(N, BLOCK_N), 8)
    row = block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    real = row < num_rows
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, 128)
    x_at = x_ptr + row[:, None] * x_stride + k[None, :]
    w_at = w_ptr + n[None, :].to(tl.int64) * D + k[:, None]
    w_scale_at = w_scales_ptr + (tile * BLOCK_N // 128) * GROUPS
    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for group in range(GROUPS):
        start = group * 128
        if EVEN:
            x = tl.load(x_at + start, mask=real[:, None], other=0.0)
            w = tl.load(w_at + start)
        else:
            inside = start + k < D
            x = tl.load(x_at + start, mask=real[:, None] & inside[None, :], other=0.0)
            w = tl.load(w_at + start, mask=(n < N)[None, :] & inside[:, None], other=0.0)
        if WIDE:
            wide = x.to(tl.float32)
            x_scale = group_scales(wide)[:, None]
            x = eight_bits(wide / x_scale, w_ptr.dtype.element_ty, ROUND)
        else:
            x_scale = tl.load(x_scales_ptr + row * GROUPS + group, mask=real, other=0.0)[:, None]
        y += tl.dot(x, w) * (x_scale * tl.load(w_scale_at + group))
    if BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(
        y_ptr + row[:, None] * N + n[None, :],
        y.to(y_ptr.dtype.element_ty),
        mask=real[:, None] & (n < N)[None, :],
    )
