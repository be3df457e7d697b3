"""Experts with weights packed in blocks: both products of all slots in one call.

Intermediate values are rounded to bf16 once, after SiLU and product in float32. Results are written
straight to their place.

N received tokens  M pairs  S slots  D hidden  F width  I stretches: some pairs of one slot
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import numba
import numpy as np
import torch
from numba import njit
from torch import Tensor

from ..cpu_isa import COLUMNS
from ..reference.experts import PLAIN_FORM, ExpertForm
from .codegen.arrays import array, exp, inner, narrow
from .codegen.block_tiles import BLOCKS, ROWS, lay_out, multiply, room_for_rows
from .codegen.blocks import STRETCH, block_bytes, look_ahead, part, parts
from .codegen.threads import share_out, take_item
from .expert_form import add_bias, clamped_mul, form_of

_HALF = BLOCKS // 2


def experts(
    x_ND: Tensor,
    rows_M: Tensor,
    slots_M: Tensor,
    w13_S: Tensor,
    w2_S: Tensor,
    counts_S: Tensor,
    form: ExpertForm = PLAIN_FORM,
) -> Tensor:
    """Same as ``experts.experts_reference``, with w13_S [S, 2 F / 16, D / 2, 16, 2] and w2_S [S, D
    / 16, F / 2, 16, 2] (``codegen/blocks.py``).
    """
    assert x_ND.dtype == torch.bfloat16 and (x_ND.stride(1) == 1 or not len(x_ND)), (
        f"x: {x_ND.dtype}, strides {x_ND.stride()}"
    )
    y_MD = torch.empty((len(slots_M), x_ND.shape[1]), dtype=x_ND.dtype)
    places = (x_ND.data_ptr(), 2 * x_ND.stride(0), w13_S.data_ptr(), w2_S.data_ptr(), 2 * w2_S.shape[2])
    pairs = array(rows_M.contiguous()), array(slots_M.contiguous())
    run_experts(
        *places, *pairs, array(counts_S), array(y_MD), form_of(form, x_ND.dtype), numba.get_num_threads()
    )
    return y_MD


@njit(cache=True, error_model="numpy")
def sort_pairs(slots_M, counts_S):
    """Returns the pairs that have a slot, ordered by slot, and the end of each slot's run. Adds
    each slot's number of pairs to counts_S.
    """
    ends_S = np.zeros(len(counts_S), np.int64)
    for slot in slots_M:
        if slot >= 0:
            ends_S[slot] += 1
    counts_S += ends_S
    ends_S = np.cumsum(ends_S)
    order_M = np.empty(ends_S[-1], np.int64)
    next_S = ends_S.copy()
    for pair in range(len(slots_M) - 1, -1, -1):
        slot = slots_M[pair]
        if slot >= 0:
            next_S[slot] -= 1
            order_M[next_S[slot]] = pair
    return order_M, ends_S


@inner(error_model="numpy")
def stretches(ends_S):
    """Cuts the ordered pairs into stretches: slot, start and length of each."""
    count, start = 0, 0
    for end in ends_S:
        count += parts(end - start, STRETCH)
        start = end
    found_I = np.empty((count, 3), np.int64)
    i, start = 0, 0
    for slot, end in enumerate(ends_S):
        of = parts(end - start, STRETCH)
        for number in range(of):
            first, length = part(number, of, end - start)
            found_I[i, 0], found_I[i, 1], found_I[i, 2] = slot, start + first, length
            i += 1
        start = end
    return found_I


@njit(cache=True, error_model="numpy")
def run_experts(x, x_stride, w13, w2, width, rows_M, slots_M, counts_S, y_MD, form, num_threads):
    """x, w13 and w2 are addresses; ``x_stride`` is in bytes."""
    order_M, ends_S = sort_pairs(slots_M, counts_S)
    if len(order_M) < len(slots_M):
        for m in range(len(slots_M)):
            if slots_M[m] < 0:
                y_MD[m] = 0
    stretches_I = stretches(ends_S)
    inner_MF = np.empty((len(order_M), width), np.uint16)
    next_inner, next_outer = np.zeros(1, np.int64), np.zeros(1, np.int64)
    given = x, x_stride, rows_M, order_M, stretches_I, w13, y_MD.shape[1], next_inner, form, inner_MF
    share_out(_inner, num_threads, given, False)
    then = inner_MF, order_M, stretches_I, w2, next_outer, form.down_bias, y_MD
    share_out(_outer, num_threads, then, False)


@njit(cache=True, inline="always")
def _first_block(item, panels, stretches_I, num_blocks, step):
    """First block of the panel of item ``item``, counted over all slots. Items past the last one
    get block 0.
    """
    stretch = item // panels
    return stretches_I[stretch, 0] * num_blocks + item % panels * step if stretch < len(stretches_I) else 0


@inner(error_model="numpy")
def _inner(begin, end, x, x_stride, rows_M, order_M, stretches_I, w13, num_inner, counter, form, inner_MF):
    """The activation for the pairs in order. A panel is two blocks of gate columns and the same
    two of up.
    """
    sums, rows, blocks = (
        np.empty((ROWS, BLOCKS * COLUMNS), np.float32),
        np.empty(STRETCH, np.int64),
        np.empty(BLOCKS, np.int64),
    )
    room, laid_out = room_for_rows(min(STRETCH, len(inner_MF)), num_inner), -1
    bias_SF, clamped, alpha, limit = form.up_bias, form.clamped, form.alpha, form.limit
    full, half = inner_MF.shape[1], _HALF * COLUMNS
    num_blocks = full // COLUMNS
    panels = parts(num_blocks, _HALF)
    item = take_item(counter)
    while item < panels * len(stretches_I):
        following = take_item(counter)
        here = _first_block(item, panels, stretches_I, 2 * num_blocks, _HALF)
        there = _first_block(following, panels, stretches_I, 2 * num_blocks, _HALF)
        panel = item % panels
        for b in range(_HALF):
            blocks[b] = w13 + (here + min(b, num_blocks - 1 - panel * _HALF)) * block_bytes(num_inner)
            blocks[_HALF + b] = blocks[b] + num_blocks * block_bytes(num_inner)
        column = panel * half
        width = min(half, full - column)
        slot, start, length = stretches_I[item // panels]
        if item // panels != laid_out:
            for r in range(length):
                rows[r] = x + rows_M[order_M[start + r]] * x_stride
            lay_out(rows, length, num_inner, room)
            laid_out = item // panels
        tiles = parts(length, ROWS)
        for tile in range(tiles):
            first, num_rows = part(tile, tiles, length)
            fetch = look_ahead(tile, tiles, num_inner, (there - here) * block_bytes(num_inner))
            multiply(num_rows, sums, rows[first:], blocks, num_inner // 2, fetch)
            for r in range(num_rows):
                if len(bias_SF):
                    add_bias(sums[r], bias_SF[slot, column : column + width])
                    add_bias(sums[r, half:], bias_SF[slot, full + column : full + column + width])
                if clamped:
                    _clamped_mul(sums[r], inner_MF[start + first + r, column : column + width], alpha, limit)
                else:
                    _silu_mul(sums[r], inner_MF[start + first + r, column : column + width])
        item = following


@inner(error_model="numpy")
def _silu_mul(gate_up, out):
    for n in range(len(out)):
        gate = gate_up[n]
        out[n] = narrow(gate / (np.float32(1) + exp(-gate)) * gate_up[_HALF * COLUMNS + n], out)


@inner(error_model="numpy")
def _clamped_mul(gate_up, out, alpha, limit):
    for n in range(len(out)):
        out[n] = narrow(clamped_mul(gate_up[n], gate_up[_HALF * COLUMNS + n], alpha, limit), out)


@inner(error_model="numpy")
def _outer(begin, end, inner_MF, order_M, stretches_I, w2, counter, bias_SD, y_MD):
    """The second product. Writes each row to its pair's place."""
    sums, rows, blocks = (
        np.empty((ROWS, BLOCKS * COLUMNS), np.float32),
        np.empty(STRETCH, np.int64),
        np.empty(BLOCKS, np.int64),
    )
    num_blocks, num_inner = y_MD.shape[1] // COLUMNS, inner_MF.shape[1]
    room, laid_out = room_for_rows(min(STRETCH, len(inner_MF)), num_inner), -1
    panels = parts(num_blocks, BLOCKS)
    item = take_item(counter)
    while item < panels * len(stretches_I):
        following = take_item(counter)
        here = _first_block(item, panels, stretches_I, num_blocks, BLOCKS)
        there = _first_block(following, panels, stretches_I, num_blocks, BLOCKS)
        panel = item % panels
        for b in range(BLOCKS):
            blocks[b] = w2 + (here + min(b, num_blocks - 1 - panel * BLOCKS)) * block_bytes(num_inner)
        column = panel * BLOCKS * COLUMNS
        width = min(BLOCKS * COLUMNS, y_MD.shape[1] - column)
        slot, start, length = stretches_I[item // panels]
        if item // panels != laid_out:
            for r in range(length):
                rows[r] = inner_MF[start + r].ctypes.data
            lay_out(rows, length, num_inner, room)
            laid_out = item // panels
        tiles = parts(length, ROWS)
        for tile in range(tiles):
            first, num_rows = part(tile, tiles, length)
            fetch = look_ahead(tile, tiles, num_inner, (there - here) * block_bytes(num_inner))
            multiply(num_rows, sums, rows[first:], blocks, num_inner // 2, fetch)
            for r in range(num_rows):
                y_D = y_MD[order_M[start + first + r]]
                if len(bias_SD):
                    add_bias(sums[r], bias_SD[slot, column : column + width])
                for n in range(width):
                    y_D[column + n] = narrow(sums[r, n], y_D)
        item = following
