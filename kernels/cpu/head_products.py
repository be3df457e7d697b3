"""Products of rows with weights of one matrix per head, as decode rows of latent attention need.
Weights are read once, in place.

For one row of 128 heads by 128 x 512 in bf16, ``torch.bmm`` takes 3.7 ms if the inner dimension is
the weights' last, because it first lays the weights out anew; reading them takes 0.4 ms (2 cores of
an EPYC Turin, torch 2.13). A row's result does not depend on its neighbours.

R rows  H heads  I inner dims  O outer dims  N = 64 outer dims
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from .codegen.arrays import array, computes, inner
from .codegen.threads import parts, share_out
from .codegen.tiles import TILE_COLUMNS, TILE_ROWS, add_product
from .codegen.vectors import LANES
from .flash import pair_rows, room_for, turn_rows, units
from .kv_entries import NO_SCALES, move_rows


def multiply_heads(x_RHI: Tensor, w_HIO: Tensor, out_RHO: Tensor) -> None:
    """out[r, h] = x[r, h] @ w[h], for tensors of one dtype. ``out`` may be part of wider rows."""
    if _fit(x_RHI, w_HIO, out_RHO):
        _multiply(array(x_RHI), array(w_HIO), array(out_RHO))
    else:
        out_RHO.copy_(torch.bmm(x_RHI.transpose(0, 1), w_HIO).transpose(0, 1))


def multiply_heads_turned(x_RHI: Tensor, w_HOI: Tensor, out_RHO: Tensor) -> None:
    """The same with transposed weights."""
    if _fit(x_RHI, w_HOI, out_RHO):
        _multiply_turned(array(x_RHI), array(w_HOI), array(out_RHO))
    else:
        out_RHO.copy_(torch.bmm(x_RHI.transpose(0, 1), w_HOI.transpose(1, 2)).transpose(0, 1))


def _fit(x_RHI: Tensor, w: Tensor, out_RHO: Tensor) -> bool:
    """Whether sizes are multiples of the tile and the values of a row are contiguous."""
    whole = x_RHI.shape[2] % (2 * LANES) == 0 and out_RHO.shape[2] % TILE_COLUMNS == 0
    return computes(x_RHI.dtype) and whole and x_RHI.stride(2) == w.stride(2) == out_RHO.stride(2) == 1


@njit(cache=True)
def _multiply(x_RHI, w_HIO, out_RHO):
    share_out(_multiply_some, x_RHI.shape[1], (x_RHI, w_HIO, out_RHO), False)


@inner()
def _multiply_some(begin, end, x_RHI, w_HIO, out_RHO):
    for head in range(begin, end):
        rows, w_IO, out_RO = _rows(x_RHI, head), w_HIO[head], out_RHO[:, head]
        row_units = units(rows)
        sums = np.empty((TILE_ROWS, TILE_COLUMNS), np.float32)
        paired = units(room_for(row_units.shape[1], TILE_COLUMNS * row_units.itemsize // rows.itemsize, rows))
        for column in range(0, out_RHO.shape[2], TILE_COLUMNS):
            pair_rows(w_IO, None, 0, column, paired)
            _multiply_rows(row_units, paired, sums, column, out_RO)


@njit(cache=True)
def _multiply_turned(x_RHI, w_HOI, out_RHO):
    share_out(_multiply_some_turned, x_RHI.shape[1], (x_RHI, w_HOI, out_RHO), False)


@inner()
def _multiply_some_turned(begin, end, x_RHI, w_HOI, out_RHO):
    for head in range(begin, end):
        rows, w_OI, out_RO = _rows(x_RHI, head), w_HOI[head], out_RHO[:, head]
        row_units = units(rows)
        sums = np.empty((TILE_ROWS, TILE_COLUMNS), np.float32)
        turned = units(room_for(row_units.shape[1], TILE_COLUMNS * row_units.itemsize // rows.itemsize, rows))
        for column in range(0, out_RHO.shape[2], TILE_COLUMNS):
            turn_rows(w_OI, None, column, 0, turned)
            _multiply_rows(row_units, turned, sums, column, out_RO)


@inner()
def _rows(x_RHI, head):
    """The rows of one head, padded to whole tiles."""
    rows = room_for(parts(len(x_RHI), TILE_ROWS) * TILE_ROWS, x_RHI.shape[2], x_RHI)
    move_rows(x_RHI[:, head], 0, 0, x_RHI.shape[2], NO_SCALES, 0, rows, 0, 0, len(x_RHI))
    return rows


@inner()
def _multiply_rows(row_units, w_UN, sums, column, out_RO):
    for first in range(0, len(row_units), TILE_ROWS):
        add_product(sums, 0, None, row_units, first, w_UN, 0, 4)
        move_rows(
            sums, 0, 0, TILE_COLUMNS, NO_SCALES, 0, out_RO, first, column, min(TILE_ROWS, len(out_RO) - first)
        )
