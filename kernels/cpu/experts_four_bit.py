"""Experts with weights in 4 bits on a CPU: weights are read as they are stored.

With AVX512-BF16 rows of bf16 are multiplied by the codes' numbers (``codegen/nibbles.py``), and the
scales are applied to sums of a group; intermediate values are rounded to bf16 once. Elsewhere, and
for float32, a weight row is decoded to float32 and multiplied with all its rows.

N received tokens  M pairs  S slots  D hidden  F width  K values of a row  G its groups
I stretches: some pairs of one slot
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from ..reference.experts import PLAIN_FORM, ExpertForm
from ..reference.four_bit import FourBit
from .codegen.arrays import ALONE, array, exp, inner, made, narrow, widen
from .codegen.blocks import add_bias, stretches
from .codegen.crew import num_threads
from .codegen.float_nibbles import (
    arranged_floats,
    decode_row,
    decoded_dots,
    float_dots,
    rows_at_once,
)
from .codegen.nibbles import AT_ONCE, BLOCK, ROWS, arranged, dots, weight_rows
from .codegen.threads import part, parts, share_out, take_item
from .codegen.vectors import LANES, multiplies_bf16
from .expert_blocks import sort_pairs
from .expert_form import clamped_mul, form_of

_SCALE_BITS = {"bf16": torch.uint16, "fp16": torch.int16, "e8m0": torch.uint8, "e4m3": torch.int8}


@dataclass(frozen=True)
class FourBitArrays:
    """``FourBit`` as kernels read it, over the same memory: scales as ``nibbles`` tells them apart,
    and factors, ones where there are none. ``in_registers``: codes are decoded there for rows of
    bf16.
    """

    codes: NDArray[np.uint8]
    scales: NDArray[Any]
    factors: NDArray[np.float32]
    in_registers: bool


def experts_four_bit(
    x_ND: Tensor,
    rows_M: Tensor,
    slots_M: Tensor,
    w13: FourBit | FourBitArrays,
    w2: FourBit | FourBitArrays,
    counts_S: Tensor,
    form: ExpertForm = PLAIN_FORM,
) -> Tensor:
    """Same as ``four_bit.experts_four_bit``, but that weights are not rounded. Strided arguments
    are copied: numba would compile for 2 to 5 s of CPU time once more.
    """
    up, down = (w if isinstance(w, FourBitArrays) else pack_four_bit(w) for w in (w13, w2))
    y_MD, y = made((len(slots_M), x_ND.shape[1]), x_ND.dtype)
    run = run_packed if x_ND.dtype == torch.bfloat16 and up.in_registers else run_decoded
    run(
        array(x_ND.contiguous()),
        array(rows_M.contiguous()),
        array(slots_M.contiguous()),
        up.codes,
        up.scales,
        up.factors,
        down.codes,
        down.scales,
        down.factors,
        array(counts_S),
        y,
        form_of(form, x_ND.dtype),
        num_threads(),
    )
    return y_MD


def pack_four_bit(w: FourBit) -> FourBitArrays:
    """Weights in 4 bits as ``experts_four_bit`` reads them: they stay where they are."""
    codes = w.codes.detach().numpy()
    scales = w.scales.detach().view(_SCALE_BITS[w.format.scale]).numpy()
    factors = np.ones((len(codes), 2), np.float32) if w.factors is None else w.factors.detach().numpy()
    return FourBitArrays(codes, scales, factors, multiplies_bf16())


@njit(cache=True, error_model="numpy")
def run_packed(
    x_ND,
    rows_M,
    slots_M,
    w13,
    scales_13,
    factors_13,
    w2,
    scales_2,
    factors_2,
    counts_S,
    y_MD,
    form,
    num_threads,
):
    """With rows of bf16, as uint16."""
    order_M, ends_S = sort_pairs(slots_M, counts_S)
    _clear(slots_M, y_MD, len(order_M))
    found_I = stretches(ends_S)
    width = 2 * w2.shape[2]
    x_NK = np.zeros((len(x_ND), parts(x_ND.shape[1], AT_ONCE) * AT_ONCE), np.uint16)
    share_out(_arrange, len(x_ND), (x_ND, x_NK), x_NK.size <= ALONE)
    inner_MK = np.zeros((len(order_M), parts(width, AT_ONCE) * AT_ONCE), np.uint16)
    first = np.zeros(1, np.int64)
    second = np.zeros(1, np.int64)
    given = x_NK, rows_M, order_M, found_I, w13, scales_13, factors_13, width, first, form, inner_MK
    share_out(_up, num_threads, given, False)
    then = inner_MK, order_M, found_I, w2, scales_2, factors_2, second, form.down_bias, y_MD
    share_out(_down, num_threads, then, False)


@inner(error_model="numpy")
def _clear(slots_M, y_MD, num_real):
    """Zeros for pairs without a slot."""
    if num_real < len(slots_M):
        for m in range(len(slots_M)):
            if slots_M[m] < 0:
                y_MD[m] = 0


@inner(error_model="numpy")
def _arrange(begin, end, x_ND, x_NK):
    for n in range(begin, end):
        for k in range(x_ND.shape[1]):
            x_NK[n, arranged(k)] = x_ND[n, k]


@inner(error_model="numpy")
def _up(
    begin, end, x_NK, rows_M, order_M, found_I, codes_S, scales_S, factors_S, width, counter, form, inner_MK
):
    """The activation for the pairs in order."""
    bias_SF, clamped, alpha, limit = form.up_bias, form.clamped, form.alpha, form.limit
    rows = np.zeros(ROWS, np.int64)
    out = np.zeros((2, ROWS, BLOCK), np.float32)
    blocks = parts(width, BLOCK)
    item = take_item(counter)
    while item < blocks * len(found_I):
        slot, start, length = found_I[item // blocks]
        first = item % blocks * BLOCK
        count = min(BLOCK, width - first)
        weights = weight_rows(codes_S[slot], scales_S[slot], first, width, 1, count)
        tiles = parts(length, ROWS)
        for tile in range(tiles):
            begin_row, num_rows = part(tile, tiles, length)
            begin_row += start
            for r in range(ROWS):
                row = rows_M[order_M[begin_row + min(r, num_rows - 1)]]
                rows[r] = x_NK[row].ctypes.data
            dots(num_rows, rows, scales_S, weights, out)
            for r in range(num_rows):
                if clamped or len(bias_SF):
                    gate_F, up_F = out[0, r, :count], out[1, r, :count]
                    _scale(gate_F, up_F, factors_S[slot])
                    if len(bias_SF):
                        add_bias(gate_F, bias_SF[slot, first : first + count])
                        add_bias(up_F, bias_SF[slot, width + first : width + first + count])
                    _activate(gate_F, up_F, clamped, alpha, limit)
                else:
                    _silu_mul(out[0, r, :count], out[1, r, :count], factors_S[slot])
                target = inner_MK[begin_row + r]
                for f in range(count):
                    target[arranged(first + f)] = narrow(out[0, r, f], target)
        item = take_item(counter)


@inner(error_model="numpy")
def _silu_mul(gate_F, up_F, factors_P):
    """silu(gate) * up in place of gate."""
    for f in range(len(gate_F)):
        gate = gate_F[f] * factors_P[0]
        gate_F[f] = gate / (np.float32(1) + exp(-gate)) * (up_F[f] * factors_P[1])


@inner(error_model="numpy")
def _scale(gate_F, up_F, factors_P):
    for f in range(len(gate_F)):
        gate_F[f] *= factors_P[0]
        up_F[f] *= factors_P[1]


@inner(error_model="numpy")
def _activate(gate_F, up_F, clamped, alpha, limit):
    """The activation in place of gate."""
    if clamped:
        for f in range(len(gate_F)):
            gate_F[f] = clamped_mul(gate_F[f], up_F[f], alpha, limit)
    else:
        for f in range(len(gate_F)):
            gate_F[f] = gate_F[f] / (np.float32(1) + exp(-gate_F[f])) * up_F[f]


@inner(error_model="numpy")
def _down(begin, end, inner_MK, order_M, found_I, codes_S, scales_S, factors_S, counter, bias_SD, y_MD):
    """The second product. Writes each row to its pair's place."""
    rows = np.zeros(ROWS, np.int64)
    out = np.zeros((2, ROWS, BLOCK), np.float32)
    hidden = y_MD.shape[1]
    blocks = parts(hidden, 2 * BLOCK)
    item = take_item(counter)
    while item < blocks * len(found_I):
        slot, start, length = found_I[item // blocks]
        first = item % blocks * 2 * BLOCK
        count = min(2 * BLOCK, hidden - first) // 2
        weights = weight_rows(codes_S[slot], scales_S[slot], first, 1, 2, count)
        tiles = parts(length, ROWS)
        for tile in range(tiles):
            begin_row, num_rows = part(tile, tiles, length)
            begin_row += start
            for r in range(ROWS):
                rows[r] = inner_MK[begin_row + min(r, num_rows - 1)].ctypes.data
            dots(num_rows, rows, scales_S, weights, out)
            for r in range(num_rows):
                y_D = y_MD[order_M[begin_row + r]]
                for d in range(count):
                    for w in range(2):
                        value = out[w, r, d] * factors_S[slot, 0]
                        if len(bias_SD):
                            value += widen(bias_SD[slot, first + 2 * d + w])
                        y_D[first + 2 * d + w] = narrow(value, y_D)
        item = take_item(counter)


@njit(cache=True, error_model="numpy")
def run_decoded(
    x_ND,
    rows_M,
    slots_M,
    w13,
    scales_13,
    factors_13,
    w2,
    scales_2,
    factors_2,
    counts_S,
    y_MD,
    form,
    num_threads,
):
    """With rows of bf16, as uint16, or float32. Rows of x lie in the order of decoded weights."""
    order_M, ends_S = sort_pairs(slots_M, counts_S)
    _clear(slots_M, y_MD, len(order_M))
    found_I = stretches(ends_S)
    x_NK = np.zeros((len(x_ND), parts(x_ND.shape[1], AT_ONCE) * AT_ONCE), np.float32)
    share_out(_widen, len(x_ND), (x_ND, x_NK), x_NK.size <= ALONE)
    inner_MK = np.zeros((len(order_M), parts(2 * w2.shape[2], AT_ONCE) * AT_ONCE), np.float32)
    first = np.zeros(1, np.int64)
    second = np.zeros(1, np.int64)
    given = x_NK, rows_M, order_M, found_I, w13, scales_13, factors_13, first, form, inner_MK
    share_out(_decoded_up, num_threads, given, False)
    then = inner_MK, order_M, found_I, w2, scales_2, factors_2, second, form.down_bias, y_MD
    share_out(_decoded_down, num_threads, then, False)


@inner(error_model="numpy")
def _widen(begin, end, x_ND, x_NK):
    for n in range(begin, end):
        for k in range(x_ND.shape[1]):
            x_NK[n, arranged_floats(k)] = widen(x_ND[n, k])


@inner(error_model="numpy")
def _block_dots(rows_I, codes_NK, scales_NG, runs, room, out):
    """out[i, w, r] float32 [32, 2, rows] = the products of ``count`` pairs of weight rows with all
    rows whose addresses are in ``rows_I``. ``runs``: first, gap, step, count, as ``weight_rows``
    takes them. ``room``: ``_room``.
    """
    first, gap, step, count = runs
    rows, sums, weights = room
    length = len(rows_I)
    most = rows_at_once(len(rows_I))
    if most > 0:
        pairs = weight_rows(codes_NK, scales_NG, first, gap, step, count)
        tiles = parts(length, most)
        for tile in range(tiles):
            begin_row, num_rows = _take_rows(tile, tiles, rows_I, rows)
            decoded_dots(num_rows, rows, scales_NG, pairs, sums)
            for i in range(count):
                for w in range(2):
                    for r in range(num_rows):
                        out[i, w, begin_row + r] = sums[w, r, i]
        return
    tiles = parts(length, ROWS)
    for i in range(count):
        for w in range(2):
            row = first + i * step + w * gap
            decode_row(codes_NK[row], scales_NG[row], weights[w])
        for tile in range(tiles):
            begin_row, num_rows = _take_rows(tile, tiles, rows_I, rows)
            float_dots(num_rows, rows, weights, weights.shape[1] // LANES, sums)
            for w in range(2):
                for r in range(num_rows):
                    out[i, w, begin_row + r] = sums[w, r, 0]


@inner(error_model="numpy")
def _take_rows(tile, tiles, rows_I, rows):
    """Fills ``rows`` with the addresses of a tile. Returns its first row, and how many it has."""
    first, num_rows = part(tile, tiles, len(rows_I))
    for r in range(ROWS):
        rows[r] = rows_I[first + min(r, num_rows - 1)]
    return first, num_rows


@inner(error_model="numpy")
def _room(num_values):
    """For ``_block_dots``: six addresses, the products of a tile, two decoded weight rows."""
    return (
        np.zeros(ROWS, np.int64),
        np.zeros((2, ROWS, BLOCK), np.float32),
        np.zeros((2, num_values), np.float32),
    )


@inner(error_model="numpy")
def _longest(found_I):
    longest = 0
    for i in range(len(found_I)):
        longest = max(longest, found_I[i][2])
    return longest


@inner(error_model="numpy")
def _decoded_up(
    begin, end, x_NK, rows_M, order_M, found_I, codes_S, scales_S, factors_S, counter, form, inner_MK
):
    """The activation for the pairs in order."""
    bias_SF, clamped, alpha, limit = form.up_bias, form.clamped, form.alpha, form.limit
    room = _room(x_NK.shape[1])
    width = codes_S.shape[1] // 2
    longest = _longest(found_I)
    rows_I = np.zeros(longest, np.int64)
    out = np.zeros((BLOCK, 2, longest), np.float32)
    blocks = parts(width, BLOCK)
    item = take_item(counter)
    while item < blocks * len(found_I):
        slot, start, length = found_I[item // blocks]
        first = item % blocks * BLOCK
        count = min(BLOCK, width - first)
        for r in range(length):
            rows_I[r] = x_NK[rows_M[order_M[start + r]]].ctypes.data
        _block_dots(rows_I[:length], codes_S[slot], scales_S[slot], (first, width, 1, count), room, out)
        for f in range(first, first + count):
            place = arranged_floats(f)
            for r in range(length):
                gate = out[f - first, 0, r] * factors_S[slot, 0]
                up = out[f - first, 1, r] * factors_S[slot, 1]
                if len(bias_SF):
                    gate += widen(bias_SF[slot, f])
                    up += widen(bias_SF[slot, width + f])
                if clamped:
                    value = clamped_mul(gate, up, alpha, limit)
                else:
                    value = gate / (np.float32(1) + exp(-gate)) * up
                inner_MK[start + r, place] = value
        item = take_item(counter)


@inner(error_model="numpy")
def _decoded_down(
    begin, end, inner_MK, order_M, found_I, codes_S, scales_S, factors_S, counter, bias_SD, y_MD
):
    """The second product. Writes each row to its pair's place."""
    room = _room(inner_MK.shape[1])
    hidden = y_MD.shape[1]
    longest = _longest(found_I)
    rows_I = np.zeros(longest, np.int64)
    out = np.zeros((BLOCK, 2, longest), np.float32)
    blocks = parts(hidden, 2 * BLOCK)
    item = take_item(counter)
    while item < blocks * len(found_I):
        slot, start, length = found_I[item // blocks]
        first = item % blocks * 2 * BLOCK
        count = min(2 * BLOCK, hidden - first) // 2
        for r in range(length):
            rows_I[r] = inner_MK[start + r].ctypes.data
        _block_dots(rows_I[:length], codes_S[slot], scales_S[slot], (first, 1, 2, count), room, out)
        for r in range(length):
            y_D = y_MD[order_M[start + r]]
            for d in range(2 * count):
                value = out[d // 2, d % 2, r] * factors_S[slot, 0]
                if len(bias_SD):
                    value += widen(bias_SD[slot, first + d])
                y_D[first + d] = narrow(value, y_D)
        item = take_item(counter)
