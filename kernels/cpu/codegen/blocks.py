"""Weights in blocks of 16 columns, and products of rows with them, for x86 processors without AMX.

Packed weights are [..., N / 16, K / 2, 16, 2] instead of [..., N, K]: a vector holds two
neighbouring k of 16 columns, which are multiplied by the same two k of a row (``block_tiles.py``).
For any number of rows, k is summed from first to last in one register, so a result depends neither
on neighbouring rows nor on the number of threads.

With AVX512-BF16, few rows take as long as reading the weights from memory up to 50 GB/s; at 75 GB/s
four rows take 1.25 times as long. From 32 rows on the rate equals oneDNN's within a tenth either
way, 860 to 980 GFLOP/s (2 cores of an EPYC Turin).

N columns  K inner values  P panels of up to four blocks
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import mmap

import numpy as np
import torch
from numba import njit
from torch import Tensor

from ...cpu_isa import COLUMNS, fit
from .arrays import inner, narrow, widen
from .block_tiles import BLOCKS, PACE, ROWS, lay_out, multiply, room_for_rows
from .threads import share_out, take_item

STRETCH = 96  # rows that use a panel while it is in the cache; few enough for threads to share evenly

_AHEAD = 4096  # bytes to prefetch ahead in a panel that is read once, into the L2 cache: it waits there


def pack_blocks(weights: Tensor) -> Tensor:
    """Packs bf16 [..., N, K] as [..., N / 16, K / 2, 16, 2] in memory of its own. Uses huge pages
    if the system has them: 5 to 10 % more bandwidth.
    """
    *leading, num_columns, num_inner = weights.shape
    assert weights.dtype == torch.bfloat16 and fit(num_columns, num_inner), (
        f"{weights.dtype} {tuple(weights.shape)}"
    )
    memory = mmap.mmap(-1, weights.nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    packed = torch.frombuffer(memory, dtype=torch.bfloat16).view(
        *leading, num_columns // COLUMNS, num_inner // 2, COLUMNS, 2
    )
    return packed.copy_(
        weights.detach().view(*leading, num_columns // COLUMNS, COLUMNS, num_inner // 2, 2).transpose(-3, -2)
    )


@njit(cache=True, inline="always")
def look_ahead(tile, tiles, num_inner, next_panel):
    """A tile's prefetch: distance in bytes from its blocks, and vectors to prefetch per 1024
    vectors read. The tiles of a panel share the prefetch of the next one, ``next_panel`` bytes
    away. At 16 to 64 rows a slot this is 9 to 26 % faster than leaving it all to the last tile. A
    panel of one tile prefetches itself.
    """
    if tiles == 1:
        return _AHEAD, PACE
    return next_panel + num_inner // 2 * tile // tiles * 4 * COLUMNS, PACE // tiles


@njit(cache=True, inline="always")
def block_bytes(num_inner):
    """Bytes from one block to the next."""
    return 2 * COLUMNS * num_inner


@njit(cache=True, inline="always")
def part(number, of, total):
    """Start and length of part ``number``, when ``total`` is cut into ``of`` parts as evenly as
    possible.
    """
    start = total * number // of
    return start, total * (number + 1) // of - start


@njit(cache=True, inline="always")
def parts(total, most):
    """Number of parts of at most ``most``."""
    return (total + most - 1) // most


@njit(cache=True, error_model="numpy")
def multiply_rows(x, x_stride, w, num_inner, bias_N, y_TN, num_threads):
    """y = x w^T + b. ``x`` is the address of the first row, ``x_stride`` the bytes between rows,
    ``w`` the address of packed weights [N / 16, K / 2, 16, 2]. ``bias_N`` is empty for no bias.
    """
    counter = np.zeros(1, np.int64)
    share_out(_multiply_panels, num_threads, (x, x_stride, w, num_inner, bias_N, y_TN, counter), False)


@inner(error_model="numpy")
def _multiply_panels(begin, end, x, x_stride, w, num_inner, bias_N, y_TN, counter):
    num_blocks = y_TN.shape[1] // COLUMNS
    panels, stretches = parts(num_blocks, BLOCKS), parts(len(y_TN), STRETCH)
    for _ in range(begin, end):
        sums, rows, blocks = (
            np.empty((ROWS, BLOCKS * COLUMNS), np.float32),
            np.empty(STRETCH, np.int64),
            np.empty(BLOCKS, np.int64),
        )
        room, laid_out = room_for_rows(min(STRETCH, len(y_TN)), num_inner), -1
        item = take_item(counter)
        while item < panels * stretches:
            following = take_item(counter)
            stretch, panel = item // panels, item % panels
            start, length = part(stretch, stretches, len(y_TN))
            if stretch != laid_out:
                for r in range(length):
                    rows[r] = x + (start + r) * x_stride
                lay_out(rows, length, num_inner, room)
                laid_out = stretch
            for b in range(BLOCKS):
                blocks[b] = w + min(panel * BLOCKS + b, num_blocks - 1) * block_bytes(num_inner)
            column = panel * BLOCKS * COLUMNS
            width = min(BLOCKS * COLUMNS, y_TN.shape[1] - column)
            tiles = parts(length, ROWS)
            for tile in range(tiles):
                first, num_rows = part(tile, tiles, length)
                next_panel = (following % panels - panel) * BLOCKS * block_bytes(num_inner)
                multiply(
                    num_rows,
                    sums,
                    rows[first:],
                    blocks,
                    num_inner // 2,
                    look_ahead(tile, tiles, num_inner, next_panel),
                )
                for r in range(num_rows):
                    _write(
                        sums[r, :width],
                        bias_N[column : column + width],
                        y_TN[start + first + r, column : column + width],
                    )
            item = following


@njit(cache=True, inline="always")
def _write(sums_N, bias_N, y_N):
    if len(bias_N):
        for n in range(len(sums_N)):
            y_N[n] = narrow(sums_N[n] + widen(bias_N[n]), y_N)
    else:
        for n in range(len(sums_N)):
            y_N[n] = narrow(sums_N[n], y_N)
