"""Weights in blocks of 16 columns, and products of rows with them.

Packed weights are [..., N / 16, U, 16, K / U] instead of [..., N, K]. A unit is the piece of the
inner dimension that one lane of a product takes: two neighbouring bf16 or one float32. A vector
holds a unit of 16 columns, which is multiplied by the same unit of a row (``block_tiles.py``); AMX
takes 16 of them at once (``amx.py``). For any number of rows, k is summed from first to last in one
register, so a result depends neither on neighbouring rows nor on the number of threads.

With AVX512-BF16, few rows take as long as reading the weights from memory up to 50 GB/s; at 75 GB/s
four rows take 1.25 times as long. From 32 rows on the rate equals oneDNN's within a tenth either
way, 860 to 980 GFLOP/s (2 cores of an EPYC Turin).

N columns  K inner values  U units of them  T rows  S slots  M pairs
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import mmap

import numpy as np
import torch
from numba import njit
from torch import Tensor

from ... import cpu_isa
from ...cpu_isa import COLUMNS, fit
from .amx import begin_tiles, end_tiles
from .arrays import inner, widen
from .block_rows import find_between, first_between, lay_out, room_for_rows, write_row
from .block_tiles import BLOCKS, multiply
from .threads import part, parts, share_out, take_item

# Rows that use a panel while it is in the cache: enough for products to take longer than reading it
# does, few enough for threads to share evenly.
STRETCH = 256 if cpu_isa.here() == "amx" else 96

_FEW = 16  # rows of a stretch
_RUNS = 4  # per thread


def pack_blocks(weights: Tensor) -> Tensor:
    """Packs [..., N, K], bf16 or float32, as [..., N / 16, U, 16, K / U] in memory of its own. Uses
    huge pages if the system has them: 5 to 10 % more bandwidth.
    """
    *leading, num_columns, num_inner = weights.shape
    assert weights.dtype in (torch.bfloat16, torch.float32) and fit(num_columns, num_inner), (
        f"{weights.dtype} {tuple(weights.shape)}"
    )
    memory = mmap.mmap(-1, weights.nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    num_blocks, per_unit = num_columns // COLUMNS, 4 // weights.itemsize
    num_units = num_inner // per_unit
    packed = torch.frombuffer(memory, dtype=weights.dtype).view(
        *leading, num_blocks, num_units, COLUMNS, per_unit
    )
    loaded = weights.detach().view(*leading, num_blocks, COLUMNS, num_units, per_unit)
    return packed.copy_(loaded.transpose(-3, -2))


@njit(cache=True, inline="always")
def block_bytes(num_units):
    """Bytes from one block to the next."""
    return 4 * COLUMNS * num_units


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


@njit(cache=True, inline="always")
def first_block(item, panels, stretches_I, num_blocks, step):
    """First block of the panel of item ``item``, counted over all slots. Items past the last one
    get block 0.
    """
    stretch = item // panels
    return stretches_I[stretch, 0] * num_blocks + item % panels * step if stretch < len(stretches_I) else 0


@inner(error_model="numpy")
def run_length(panels, stretches_I, num_rows, num_threads):
    """Items that a thread takes in a row: panels of one stretch, so that not every thread lays out
    its rows. One at a time if rows are few, since then weights are what takes time.
    """
    if num_rows < _FEW * len(stretches_I):
        return 1
    return max(1, min(panels, panels * len(stretches_I) // (_RUNS * num_threads)))


@njit(cache=True, inline="always")
def next_item(item, run, counter):
    """The item after ``item``, which is -1 before the first, in runs that threads share."""
    return item + 1 if (item + 1) % run else take_item(counter) * run


@njit(cache=True, error_model="numpy")
def multiply_slots(x, x_stride, w, num_units, pairs, bias_SN, y_MN, num_threads):
    """y[places_M[m]] = x[rows_M[m]] w[s]^T + b[s] for the pairs m of every slot s, which end at
    ends_S[s]; ``pairs``: rows_M, places_M, ends_S. The first two are empty for rows and places in
    the order of the pairs, ``bias_SN`` for no bias.

    ``x`` is the address of the first row, ``x_stride`` the bytes between rows, or 0 if they lie as
    results between two products do (``block_rows.py``); ``w`` is the address of packed weights
    [S, N / 16, U, 16, K / U].
    """
    rows_M, places_M, ends_S = pairs
    given = rows_M, places_M, stretches(ends_S), bias_SN, y_MN, np.zeros(1, np.int64), num_threads
    share_out(_multiply_panels, num_threads, (x, x_stride, w, num_units, *given), False)


@inner(error_model="numpy")
def _multiply_panels(
    begin, end, x, x_stride, w, num_units, rows_M, places_M, stretches_I, bias_SN, y_MN, counter, num_threads
):
    num_blocks = y_MN.shape[1] // COLUMNS
    panels = parts(num_blocks, BLOCKS)
    run = run_length(panels, stretches_I, len(y_MN), num_threads)
    for _ in range(begin, end):
        sums, rows, blocks = (
            np.empty((STRETCH, BLOCKS * COLUMNS), np.float32),
            np.empty(STRETCH, np.int64),
            np.empty(BLOCKS, np.int64),
        )
        room, laid_out = room_for_rows(min(STRETCH, len(y_MN)) if x_stride else 0, num_units, y_MN), -1
        item = next_item(-1, run, counter)
        while item < panels * len(stretches_I):
            following = next_item(item, run, counter)
            here = first_block(item, panels, stretches_I, num_blocks, BLOCKS)
            there = first_block(following, panels, stretches_I, num_blocks, BLOCKS)
            slot, start, length = stretches_I[item // panels]
            if item // panels != laid_out:
                if x_stride:
                    for r in range(length):
                        rows[r] = x + (rows_M[start + r] if len(rows_M) else start + r) * x_stride
                    lay_out(rows, length, num_units, room, y_MN)
                else:
                    find_between(x, first_between(start, item // panels, y_MN), num_units, rows[:length])
                begin_tiles(y_MN, length)
                laid_out = item // panels
            panel = item % panels
            for b in range(BLOCKS):
                blocks[b] = w + (here + min(b, num_blocks - 1 - panel * BLOCKS)) * block_bytes(num_units)
            column = panel * BLOCKS * COLUMNS
            width = min(BLOCKS * COLUMNS, y_MN.shape[1] - column)
            multiply(length, sums, rows, blocks, num_units, (there - here) * block_bytes(num_units), y_MN)
            for r in range(length):
                place = places_M[start + r] if len(places_M) else start + r
                write_row(sums, r, bias_SN, slot, y_MN, place, column, width)
            item = following
    end_tiles(y_MN)


@inner(error_model="numpy")
def add_bias(sums_N, bias_N):
    for n in range(len(bias_N)):
        sums_N[n] += widen(bias_N[n])
