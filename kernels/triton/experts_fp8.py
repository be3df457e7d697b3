"""Triton column of ``fp8.experts_fp8``: like ``triton/experts.py``, with block-scaled FP8 on both
sides of both products.

A step of 128 along the inner dim has one scale per row of x and one for the weights, so its partial
sum is scaled once and added in float32. The first product's epilogue quantises the activation if
its tile is a whole group of 128 wide. Narrower tiles, of which a few pairs need many to fill a
card, leave the activation in float32, and every program of the second product quantises what it
loads. Rooflines: as in ``triton/experts.py``, with 3 D F bytes per slot and the FP8 rate of the
matrix units.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats.fp8_format import BLOCK
from ..reference.fp8 import Quantised
from .experts import block_and_tile
from .fp8 import eight_bits, group_scales
from .grouping import group_pairs
from .target import interpreted
from .tiles import DEFAULT, ExpertTile, Tiles


def experts_fp8(
    x: Quantised,
    pairs: tuple[Tensor, Tensor],
    w13: Quantised,
    w2: Quantised,
    counts_S: Tensor,
    dtype: torch.dtype,
    tiles: Tiles = DEFAULT,
) -> Tensor:
    """Same as ``fp8.experts_fp8``. The host reads nothing."""
    tile = tiles.of_experts(len(pairs[1]), len(w13.values), fp8=True)
    return experts_fp8_tiled(x, pairs, (w13, w2), counts_S, dtype, tile)


def experts_fp8_tiled(
    x: Quantised,
    pairs: tuple[Tensor, Tensor],
    weights: tuple[Quantised, Quantised],
    counts_S: Tensor,
    dtype: torch.dtype,
    tile: ExpertTile,
) -> Tensor:
    """``experts_fp8`` with ``weights`` (w13, w2) and a tile. Both products are one group deep and
    at most one wide.
    """
    assert (
        tile.up.depth == tile.down.depth == BLOCK
        and BLOCK % tile.up.columns == BLOCK % tile.down.columns == 0
    )
    w13, w2 = weights
    rows_M, slots_M = pairs
    assert all(part.is_contiguous() for weights in (w13, w2) for part in (weights.values, weights.scales))
    assert x.values.stride(1) == x.scales.stride(1) == 1 or not x.values.numel()
    hidden, width = w2.values.shape[1:]
    rows = tile.rows
    grouping = group_pairs(slots_M, counts_S, rows)
    num_blocks = len(grouping.slot_of_block_B)
    y_MD = torch.empty(len(slots_M), hidden, dtype=dtype, device=slots_M.device)
    if not num_blocks:
        return y_MD
    late = tile.up.columns < BLOCK
    h_dtype = torch.float32 if late else x.values.dtype
    h = Quantised(
        torch.empty(num_blocks * rows, width, dtype=h_dtype, device=slots_M.device),
        x.scales.new_empty(num_blocks * rows, 0 if late else triton.cdiv(width, BLOCK)),
    )
    common = {
        "D": hidden,
        "F": width,
        "BLOCK_M": rows,
        "EVEN": hidden % BLOCK == width % BLOCK == 0,
        "LATE": late,
        "ROUND": interpreted(),
    }
    _up_fp8_kernel[(num_blocks * triton.cdiv(width, tile.up.columns),)](
        x.values,
        x.scales,
        rows_M,
        grouping.pair_of_place_P,
        grouping.slot_of_block_B,
        w13.values,
        w13.scales,
        h.values,
        h.scales,
        num_blocks,
        x.values.stride(0),
        x.scales.stride(0),
        BLOCK_N=tile.up.columns,
        **common,
        num_warps=tile.up.warps,
        num_stages=tile.up.stages,
    )
    _down_fp8_kernel[(num_blocks * triton.cdiv(hidden, tile.down.columns),)](
        h.values,
        h.scales,
        grouping.pair_of_place_P,
        grouping.slot_of_block_B,
        w2.values,
        w2.scales,
        y_MD,
        num_blocks,
        BLOCK_N=tile.down.columns,
        **common,
        num_warps=tile.down.warps,
        num_stages=tile.down.stages,
    )
    return y_MD


@triton.jit(do_not_specialize=["num_blocks"])
def _up_fp8_kernel(
    x_ptr,
    x_scales_ptr,
    rows_ptr,
    pair_of_place_ptr,
    slot_of_block_ptr,
    w13_ptr,
    w13_scales_ptr,
    h_ptr,
    h_scales_ptr,
    num_blocks,
    x_stride,
    x_scales_stride,
    D: tl.constexpr,
    F: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr,
    LATE: tl.constexpr,
    ROUND: tl.constexpr,
):
    """One block and BLOCK_N columns of F; BLOCK_N divides 128. A whole group if h is quantised
    here.
    """
    D_GROUPS: tl.constexpr = (D + 127) // 128
    F_GROUPS: tl.constexpr = (F + 127) // 128
    block, tile = block_and_tile(num_blocks, tl.cdiv(F, BLOCK_N), 8)
    slot = tl.load(slot_of_block_ptr + block).to(tl.int64)
    if slot < 0:
        return
    place = block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    pair = tl.load(pair_of_place_ptr + place)
    real = pair >= 0
    row = tl.load(rows_ptr + pair, mask=real, other=0)
    f = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, 128)
    x_at = x_ptr + row[:, None] * x_stride + k[None, :]
    gate_at = w13_ptr + slot * (2 * F * D) + f[None, :].to(tl.int64) * D + k[:, None]
    gate_scale_at = w13_scales_ptr + (slot * (2 * F_GROUPS) + tile * BLOCK_N // 128) * D_GROUPS
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for group in range(D_GROUPS):
        start = group * 128
        if EVEN:
            x = tl.load(x_at + start, mask=real[:, None], other=0.0)
            w_gate = tl.load(gate_at + start)
            w_up = tl.load(gate_at + F * D + start)
        else:
            inside = start + k < D
            x = tl.load(x_at + start, mask=real[:, None] & inside[None, :], other=0.0)
            w_mask = (f < F)[None, :] & inside[:, None]
            w_gate = tl.load(gate_at + start, mask=w_mask, other=0.0)
            w_up = tl.load(gate_at + F * D + start, mask=w_mask, other=0.0)
        x_scale = tl.load(x_scales_ptr + row * x_scales_stride + group, mask=real, other=0.0)[:, None]
        gate += tl.dot(x, w_gate) * (x_scale * tl.load(gate_scale_at + group))
        up += tl.dot(x, w_up) * (x_scale * tl.load(gate_scale_at + F_GROUPS * D_GROUPS + group))
    h = gate / (1.0 + tl.exp(-gate)) * up
    h_at = h_ptr + place[:, None] * F + f[None, :]
    if LATE:
        tl.store(h_at, h, mask=(f < F)[None, :])
    else:
        scales = group_scales(h)
        tl.store(h_at, eight_bits(h / scales[:, None], h_ptr.dtype.element_ty, ROUND), mask=(f < F)[None, :])
        tl.store(h_scales_ptr + place * F_GROUPS + tile, scales)


@triton.jit(do_not_specialize=["num_blocks"])
def _down_fp8_kernel(
    h_ptr,
    h_scales_ptr,
    pair_of_place_ptr,
    slot_of_block_ptr,
    w2_ptr,
    w2_scales_ptr,
    y_ptr,
    num_blocks,
    D: tl.constexpr,
    F: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr,
    LATE: tl.constexpr,
    ROUND: tl.constexpr,
):
    """One block and BLOCK_N columns of D; BLOCK_N divides 128."""
    F_GROUPS: tl.constexpr = (F + 127) // 128
    D_GROUPS: tl.constexpr = (D + 127) // 128
    block, tile = block_and_tile(num_blocks, tl.cdiv(D, BLOCK_N), 8)
    slot = tl.load(slot_of_block_ptr + block).to(tl.int64)
    if slot < 0:
        return
    place = block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    pair = tl.load(pair_of_place_ptr + place).to(tl.int64)
    d = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, 128)
    h_at = h_ptr + place[:, None] * F + k[None, :]
    w_at = w2_ptr + slot * (D * F) + d[None, :].to(tl.int64) * F + k[:, None]
    w_scale_at = w2_scales_ptr + (slot * D_GROUPS + tile * BLOCK_N // 128) * F_GROUPS
    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for group in range(F_GROUPS):
        start = group * 128
        if EVEN:
            h = tl.load(h_at + start)
            w = tl.load(w_at + start)
        else:
            inside = start + k < F
            h = tl.load(h_at + start, mask=inside[None, :], other=0.0)
            w = tl.load(w_at + start, mask=(d < D)[None, :] & inside[:, None], other=0.0)
        if LATE:
            h_scale = group_scales(h)[:, None]
            h = eight_bits(h / h_scale, w2_ptr.dtype.element_ty, ROUND)
        else:
            h_scale = tl.load(h_scales_ptr + place * F_GROUPS + group)[:, None]
        y += tl.dot(h, w) * (h_scale * tl.load(w_scale_at + group))
    tl.store(
        y_ptr + pair[:, None] * D + d[None, :],
        y.to(y_ptr.dtype.element_ty),
        mask=(pair >= 0)[:, None] & (d < D)[None, :],
    )
