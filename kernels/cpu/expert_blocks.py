"""Experts with weights packed in blocks. In bf16 both products of all slots are one call;
intermediate values are rounded once, after SiLU and product in float32. Results are written
straight to their place.

N received tokens  M pairs  S slots  D hidden  F width  I stretches: some pairs of one slot
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from ..cpu_isa import COLUMNS
from ..reference.experts import PLAIN_FORM, ExpertForm, activate
from .codegen.amx import begin_tiles, end_tiles
from .codegen.arrays import array, inner, keep, narrow
from .codegen.block_rows import (
    first_between,
    lay_out,
    place_between,
    room_between,
    room_for_rows,
    stride_between,
    write_silu_row,
)
from .codegen.block_tiles import BLOCKS, multiply
from .codegen.blocks import (
    STRETCH,
    add_bias,
    block_bytes,
    first_block,
    multiply_slots,
    next_item,
    run_length,
    stretches,
)
from .codegen.crew import num_threads
from .codegen.threads import parts, share_out
from .expert_form import clamped_mul, form_of
from .linear import NO_PLACES, multiply_into
from .norm import silu_mul

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
    """Same as ``experts.experts_reference``, with w13_S [S, 2 F / 16, U, 16, D / U] and w2_S [S, D
    / 16, U, 16, F / U] (``codegen/blocks.py``).
    """
    assert x_ND.dtype == w13_S.dtype and (x_ND.stride(1) == 1 or not len(x_ND)), (
        f"x: {x_ND.dtype}, strides {x_ND.stride()}; weights: {w13_S.dtype}"
    )
    if x_ND.dtype == torch.float32:
        return _in_float32(x_ND, rows_M, slots_M, (w13_S, w2_S), counts_S, form)
    y_MD = torch.empty((len(slots_M), x_ND.shape[1]), dtype=x_ND.dtype)
    places = (x_ND.data_ptr(), 2 * x_ND.stride(0), w13_S.data_ptr(), w2_S.data_ptr(), 2 * w2_S.shape[2])
    pairs = array(rows_M.contiguous()), array(slots_M.contiguous())
    run_experts(*places, *pairs, array(counts_S), array(y_MD), form_of(form, x_ND.dtype), num_threads())
    return y_MD


def _in_float32(
    x_ND: Tensor,
    rows_M: Tensor,
    slots_M: Tensor,
    weights: tuple[Tensor, Tensor],
    counts_S: Tensor,
    form: ExpertForm,
) -> Tensor:
    """Single steps: nothing is rounded between them, and linear layers and ``silu_mul`` have
    compiled them.
    """
    order_M, ends_S, y_MD = ordered(x_ND, slots_M, counts_S)
    if not len(order_M):
        return y_MD
    (w13, w2), (up_bias, down_bias) = weights, form.biases or (None, None)
    gate_up_MF = x_ND.new_empty(len(order_M), COLUMNS * w13.shape[1])
    multiply_into(array(gate_up_MF), x_ND, w13, up_bias, (array(rows_M)[order_M], NO_PLACES, ends_S))
    plain = form.activation.kind == "silu"
    inner_MF = silu_mul(gate_up_MF) if plain else activate(gate_up_MF, form.activation)
    multiply_into(array(y_MD), inner_MF, w2, down_bias, (NO_PLACES, order_M, ends_S))
    return y_MD


def ordered(
    x_ND: Tensor, slots_M: Tensor, counts_S: Tensor
) -> tuple[NDArray[np.int64], NDArray[np.int64], Tensor]:
    """``sort_pairs``, and room for the results of all pairs: zeros if some have no slot."""
    order_M, ends_S = sort_pairs(array(slots_M), array(counts_S))
    y_MD = x_ND.new_empty(len(slots_M), x_ND.shape[1])
    return order_M, ends_S, y_MD if len(order_M) == len(slots_M) else y_MD.zero_()


@njit(cache=True, error_model="numpy")
def sort_pairs(slots_M, counts_S):
    """Returns the pairs that have a slot, ordered by slot, and the end of each slot's run. Adds
    each slot's number of pairs to counts_S.
    """
    ends_S = np.zeros(len(counts_S), np.int64)
    for slot in slots_M:
        if slot >= 0:
            ends_S[slot] += 1
    total = 0
    for slot in range(len(counts_S)):
        counts_S[slot] += ends_S[slot]
        total += ends_S[slot]
        ends_S[slot] = total
    order_M, next_S = np.empty(total, np.int64), ends_S.copy()
    for pair in range(len(slots_M) - 1, -1, -1):
        slot = slots_M[pair]
        if slot >= 0:
            next_S[slot] -= 1
            order_M[next_S[slot]] = pair
    return order_M, ends_S


@njit(cache=True, error_model="numpy")
def run_experts(x, x_stride, w13, w2, width, rows_M, slots_M, counts_S, y_MD, form, num_threads):
    """x, w13 and w2 are addresses; ``x_stride`` is in bytes."""
    order_M, ends_S = sort_pairs(slots_M, counts_S)
    if len(order_M) < len(slots_M):
        for m in range(len(slots_M)):
            if slots_M[m] < 0:
                y_MD[m] = 0
    stretches_I = stretches(ends_S)
    between = room_between(len(order_M), len(stretches_I), width, y_MD)
    given = x, x_stride, rows_M, order_M, stretches_I, w13, y_MD.shape[1] // 2, np.zeros(1, np.int64)
    share_out(_inner, num_threads, (*given, form, width, between, num_threads), False)
    place, stride = np.int64(between.ctypes.data), stride_between(width, between)
    pairs = order_M[:0], order_M, ends_S
    multiply_slots(place, stride, w2, width // 2, pairs, form.down_bias, y_MD, num_threads)
    keep(between)


@inner(error_model="numpy")
def _inner(
    begin,
    end,
    x,
    x_stride,
    rows_M,
    order_M,
    stretches_I,
    w13,
    num_units,
    counter,
    form,
    full,
    between,
    num_threads,
):
    """The activation [M, ``full``] for the pairs in order, written to ``between``. A panel is two
    blocks of gate columns and the same two of up.
    """
    sums, rows, blocks = (
        np.empty((STRETCH, BLOCKS * COLUMNS), np.float32),
        np.empty(STRETCH, np.int64),
        np.empty(BLOCKS, np.int64),
    )
    room, laid_out = room_for_rows(min(STRETCH, len(order_M)), num_units, between), -1
    bias_SF, clamped, alpha, limit = form.up_bias, form.clamped, form.alpha, form.limit
    half = _HALF * COLUMNS
    num_blocks = full // COLUMNS
    panels = parts(num_blocks, _HALF)
    run = run_length(panels, stretches_I, len(order_M), num_threads)
    item = next_item(-1, run, counter)
    while item < panels * len(stretches_I):
        following = next_item(item, run, counter)
        here = first_block(item, panels, stretches_I, 2 * num_blocks, _HALF)
        there = first_block(following, panels, stretches_I, 2 * num_blocks, _HALF)
        panel = item % panels
        for b in range(_HALF):
            blocks[b] = w13 + (here + min(b, num_blocks - 1 - panel * _HALF)) * block_bytes(num_units)
            blocks[_HALF + b] = blocks[b] + num_blocks * block_bytes(num_units)
        column = panel * half
        width = min(half, full - column)
        slot, start, length = stretches_I[item // panels]
        if item // panels != laid_out:
            for r in range(length):
                rows[r] = x + rows_M[order_M[start + r]] * x_stride
            lay_out(rows, length, num_units, room, between)
            begin_tiles(between, length)
            laid_out = item // panels
        multiply(length, sums, rows, blocks, num_units, (there - here) * block_bytes(num_units), between)
        first = first_between(start, item // panels, between)
        for r in range(length):
            if len(bias_SF):
                add_bias(sums[r], bias_SF[slot, column : column + width])
                add_bias(sums[r, half:], bias_SF[slot, full + column : full + column + width])
            row, place = place_between(first + r, column, full, between)
            if clamped:
                _clamped_mul(sums[r], between[row, place : place + width], alpha, limit)
            else:
                write_silu_row(sums, r, between, row, place, width)
        item = following
    end_tiles(between)


@inner(error_model="numpy")
def _clamped_mul(gate_up, out, alpha, limit):
    for n in range(len(out)):
        out[n] = narrow(clamped_mul(gate_up[n], gate_up[_HALF * COLUMNS + n], alpha, limit), out)
