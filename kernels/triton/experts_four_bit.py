"""Triton column of ``four_bit.experts_four_bit``: like ``triton/experts.py``, with codes of 4 bits
decoded in registers.

A step reads the bytes of BLOCK_K values, half as many rows of codes; x is read at even and at odd
places, and both halves are multiplied separately. Weights are rounded to the dtype of x, as in the
reference; not in the interpreter, which does not round to nearest. Rooflines: as in
``triton/experts.py``, with 1.5 D F bytes per slot and its scales. No card has timed it.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.experts import PLAIN_FORM, ExpertForm
from ..reference.four_bit import FourBit
from .experts import activated, biases_of, block_and_tile, form_options
from .grouping import group_pairs
from .target import check_dtype, interpreted
from .tiles import DEFAULT, ExpertTile, ProductTile, Tiles

_KINDS = {"bf16": 0, "fp16": 0, "e8m0": 1, "e4m3": 2}  # of scales


def experts_four_bit_with(tiles: Tiles) -> Callable[..., Tensor]:
    """``experts_four_bit`` with these tiles."""

    def experts_four_bit(
        x_ND: Tensor,
        rows_M: Tensor,
        slots_M: Tensor,
        w13: FourBit,
        w2: FourBit,
        counts_S: Tensor,
        form: ExpertForm = PLAIN_FORM,
    ) -> Tensor:
        """Same as ``four_bit.experts_four_bit``. The host reads nothing."""
        tile = tiles.of_experts(len(slots_M), len(w13.codes))
        return experts_four_bit_tiled(x_ND, (rows_M, slots_M), (w13, w2), counts_S, tile, form)

    return experts_four_bit


experts_four_bit = experts_four_bit_with(DEFAULT)


def experts_four_bit_tiled(
    x_ND: Tensor,
    pairs: tuple[Tensor, Tensor],
    weights: tuple[FourBit, FourBit],
    counts_S: Tensor,
    tile: ExpertTile,
    form: ExpertForm = PLAIN_FORM,
) -> Tensor:
    """``experts_four_bit`` with ``pairs`` (rows_M, slots_M), ``weights`` (w13, w2) and a tile."""
    (rows_M, slots_M), (w13, w2) = pairs, weights
    check_dtype(x_ND, "experts_four_bit: x")
    assert x_ND.stride(1) == 1 and all(part.is_contiguous() for w in weights for part in (w.codes, w.scales))
    hidden, width = w2.codes.shape[1], w2.columns
    grouping = group_pairs(slots_M, counts_S, tile.rows)
    num_blocks = len(grouping.slot_of_block_B)
    y_MD = x_ND.new_empty(len(slots_M), hidden)
    if not num_blocks:
        return y_MD
    h_PF = x_ND.new_empty(num_blocks * tile.rows, width)
    _up_four_bit_kernel[(num_blocks * triton.cdiv(width, tile.up.columns),)](
        x_ND,
        x_ND.stride(0),
        rows_M,
        grouping.pair_of_place_P,
        grouping.slot_of_block_B,
        *_pointers(w13),
        form.biases[0] if form.biases is not None else w13.codes,
        h_PF,
        num_blocks,
        D=hidden,
        F=width,
        **form_options(form),
        **_options(tile.rows, tile.up, w13),
    )
    _down_four_bit_kernel[(num_blocks * triton.cdiv(hidden, tile.down.columns),)](
        h_PF,
        grouping.pair_of_place_P,
        grouping.slot_of_block_B,
        *_pointers(w2),
        form.biases[1] if form.biases is not None else w2.codes,
        y_MD,
        num_blocks,
        D=hidden,
        F=width,
        BIASED=form.biases is not None,
        **_options(tile.rows, tile.down, w2),
    )
    return y_MD


def _pointers(w: FourBit) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales (those of eight bits as bytes) and factors (anything where there are none)."""
    scales = w.scales if w.scales.element_size() == 2 else w.scales.view(torch.uint8)
    return w.codes, scales, w.codes if w.factors is None else w.factors


def _options(rows: int, tile: ProductTile, w: FourBit) -> dict[str, int | bool]:
    return {
        "GROUP": w.format.group,
        "E2M1": w.format.name != "int4",
        "SCALES": _KINDS[w.format.scale],
        "BLOCK_M": rows,
        "BLOCK_N": tile.columns,
        "HALF_K": tile.depth // 2,
        "WIDEN": interpreted(),
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


@triton.jit
def _numbers(code, E2M1: tl.constexpr):
    """The numbers of codes of 0 to 15, float32."""
    if E2M1:
        # Sign, two bits of exponent and one of mantissa, moved to their places in float32.
        bits = ((code & 7) << 22) | ((code & 8) << 28)
        return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2^126
    return code.to(tl.float32) - 8.0


@triton.jit
def _scales(at, mask, SCALES: tl.constexpr):
    """Scales as float32."""
    raw = tl.load(at, mask=mask, other=0)
    if SCALES == 0:
        return raw.to(tl.float32)
    if SCALES == 1:
        return tl.maximum(raw.to(tl.int32) << 23, 1 << 22).to(tl.float32, bitcast=True)
    bits = raw.to(tl.int32)
    moved = ((bits & 0x7F) << 20) | ((bits & 0x80) << 24)
    return moved.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120


@triton.jit
def _weights(
    codes_at, scales_at, mask, factor, E2M1: tl.constexpr, SCALES: tl.constexpr, dtype: tl.constexpr
):
    """The weights at even and at odd places along the inner dim."""
    codes = tl.load(codes_at, mask=mask, other=0).to(tl.int32)
    scales = _scales(scales_at, mask, SCALES) * factor
    even = _numbers(codes & 15, E2M1) * scales
    odd = _numbers(codes >> 4, E2M1) * scales
    return even.to(dtype), odd.to(dtype)


@triton.jit(do_not_specialize=["num_blocks"])
def _up_four_bit_kernel(
    x_ptr,
    x_stride,
    rows_ptr,
    pair_of_place_ptr,
    slot_of_block_ptr,
    w13_ptr,
    scales_ptr,
    factors_ptr,
    bias_ptr,
    h_ptr,
    num_blocks,
    D: tl.constexpr,
    F: tl.constexpr,
    GROUP: tl.constexpr,
    E2M1: tl.constexpr,
    SCALES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HALF_K: tl.constexpr,
    WIDEN: tl.constexpr,
    BIASED: tl.constexpr,
    CLAMPED: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """h[place] = activation(x w_gate^T, x w_up^T) for one block and BLOCK_N columns of F."""
    GROUPS: tl.constexpr = (D + GROUP - 1) // GROUP
    HALF: tl.constexpr = D // 2
    block, tile = block_and_tile(num_blocks, tl.cdiv(F, BLOCK_N), 8)
    slot = tl.load(slot_of_block_ptr + block).to(tl.int64)
    if slot < 0:
        return
    place = block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    pair = tl.load(pair_of_place_ptr + place)
    real = pair >= 0
    row = tl.load(rows_ptr + pair, mask=real, other=0)
    f = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, HALF_K)
    x_at = x_ptr + row[:, None] * x_stride + 2 * k[None, :]
    gate_row = slot * (2 * F) + f[None, :].to(tl.int64)
    gate_factor = tl.load(factors_ptr + slot * 2) if SCALES == 2 else 1.0
    up_factor = tl.load(factors_ptr + slot * 2 + 1) if SCALES == 2 else 1.0
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dtype: tl.constexpr = tl.float32 if WIDEN else x_ptr.dtype.element_ty
    for start in range(0, HALF, HALF_K):
        inside = start + k < HALF
        mask = (f < F)[None, :] & inside[:, None]
        x_mask = real[:, None] & inside[None, :]
        x_even = tl.load(x_at + 2 * start, mask=x_mask, other=0.0)
        x_odd = tl.load(x_at + 2 * start + 1, mask=x_mask, other=0.0)
        codes_at = w13_ptr + gate_row * HALF + (start + k)[:, None]
        scales_at = scales_ptr + gate_row * GROUPS + ((start + k) // (GROUP // 2))[:, None]
        gate_even, gate_odd = _weights(codes_at, scales_at, mask, gate_factor, E2M1, SCALES, dtype)
        up_even, up_odd = _weights(
            codes_at + F * HALF, scales_at + F * GROUPS, mask, up_factor, E2M1, SCALES, dtype
        )
        if WIDEN:
            x_even = x_even.to(tl.float32)
            x_odd = x_odd.to(tl.float32)
        gate = tl.dot(x_even, gate_even, gate, input_precision="ieee")
        gate = tl.dot(x_odd, gate_odd, gate, input_precision="ieee")
        up = tl.dot(x_even, up_even, up, input_precision="ieee")
        up = tl.dot(x_odd, up_odd, up, input_precision="ieee")
    if BIASED:
        gate += biases_of(bias_ptr + slot * (2 * F), f, F)
        up += biases_of(bias_ptr + slot * (2 * F) + F, f, F)
    h = activated(gate, up, CLAMPED, ALPHA, LIMIT)
    tl.store(h_ptr + place[:, None] * F + f[None, :], h.to(h_ptr.dtype.element_ty), mask=(f < F)[None, :])


@triton.jit(do_not_specialize=["num_blocks"])
def _down_four_bit_kernel(
    h_ptr,
    pair_of_place_ptr,
    slot_of_block_ptr,
    w2_ptr,
    scales_ptr,
    factors_ptr,
    bias_ptr,
    y_ptr,
    num_blocks,
    D: tl.constexpr,
    F: tl.constexpr,
    GROUP: tl.constexpr,
    E2M1: tl.constexpr,
    SCALES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HALF_K: tl.constexpr,
    WIDEN: tl.constexpr,
    BIASED: tl.constexpr,
):
    """y[pair] = h w2^T for one block and BLOCK_N columns of D."""
    GROUPS: tl.constexpr = (F + GROUP - 1) // GROUP
    HALF: tl.constexpr = F // 2
    block, tile = block_and_tile(num_blocks, tl.cdiv(D, BLOCK_N), 8)
    slot = tl.load(slot_of_block_ptr + block).to(tl.int64)
    if slot < 0:
        return
    place = block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    pair = tl.load(pair_of_place_ptr + place).to(tl.int64)
    d = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, HALF_K)
    h_at = h_ptr + place[:, None] * F + 2 * k[None, :]
    w_row = slot * D + d[None, :].to(tl.int64)
    factor = tl.load(factors_ptr + slot) if SCALES == 2 else 1.0
    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dtype: tl.constexpr = tl.float32 if WIDEN else h_ptr.dtype.element_ty
    for start in range(0, HALF, HALF_K):
        inside = start + k < HALF
        mask = (d < D)[None, :] & inside[:, None]
        h_even = tl.load(h_at + 2 * start, mask=inside[None, :], other=0.0)
        h_odd = tl.load(h_at + 2 * start + 1, mask=inside[None, :], other=0.0)
        codes_at = w2_ptr + w_row * HALF + (start + k)[:, None]
        scales_at = scales_ptr + w_row * GROUPS + ((start + k) // (GROUP // 2))[:, None]
        even, odd = _weights(codes_at, scales_at, mask, factor, E2M1, SCALES, dtype)
        if WIDEN:
            h_even = h_even.to(tl.float32)
            h_odd = h_odd.to(tl.float32)
        y = tl.dot(h_even, even, y, input_precision="ieee")
        y = tl.dot(h_odd, odd, y, input_precision="ieee")
    if BIASED:
        y += biases_of(bias_ptr + slot * D, d, D)
    tl.store(
        y_ptr + pair[:, None] * D + d[None, :],
        y.to(y_ptr.dtype.element_ty),
        mask=(pair >= 0)[:, None] & (d < D)[None, :],
    )
