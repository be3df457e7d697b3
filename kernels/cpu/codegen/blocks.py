"""Weights in blocks of 16 columns, and products of rows with them, for processors with AVX512-BF16.

Packed weights are [..., N / 16, K / 2, 16, 2] instead of [..., N, K]: a vector holds two
neighbouring k of 16 columns, which ``vdpbf16ps`` multiplies by the same two k of a row. Up to 6
rows by 4 blocks are summed in registers. For any number of rows, k is summed from first to last in
one register, so a result depends neither on neighbouring rows nor on the number of threads.

Few rows take as long as reading the weights from memory up to 50 GB/s; at 75 GB/s four rows take
1.25 times as long. From 32 rows on the rate equals oneDNN's within a tenth either way, 860 to 980
GFLOP/s (2 cores of an EPYC Turin).

N columns  K inner values  P panels of up to four blocks
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import extending, njit
from numba.core import cgutils, types
from torch import Tensor

from ...cpu_isa import COLUMNS, fit
from .arrays import inner, narrow, widen
from .threads import share_out
from .vectors import F32, I32, SUMS, UNITS, multiply_add_halves, spread

BLOCKS = 4  # per panel, read side by side
ROWS = 6  # per tile: 24 sums and 4 weights use 28 of the 32 registers
STRETCH = 96  # rows that use a panel while it is in the cache; few enough for threads to share evenly

_AHEAD = 1024  # bytes to prefetch ahead in a panel that is read once: 3 to 8 % more bandwidth
_PACE = 1024  # fetches one vector per vector read


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


_intrinsic: Any = extending.intrinsic  # typed as the definition, which also takes the compiler's context

_I8, _I64 = ir.IntType(8), ir.IntType(64)


class _Tile:
    """Writes the instructions of one tile: ``num_rows`` rows by one panel."""

    def __init__(self, builder: Any, num_rows: int) -> None:
        self._builder = builder
        self._num_rows = num_rows
        self._prefetch = builder.module.declare_intrinsic(
            "llvm.prefetch.p0", (), ir.FunctionType(ir.VoidType(), (_I8.as_pointer(), I32, I32, I32))
        )

    def generate(self, sums: Any, rows: Any, blocks: Any, num_pairs: Any, fetch: Any) -> None:
        builder = self._builder
        x = self._pointers(rows, self._num_rows)
        w = self._pointers(blocks, BLOCKS)
        before, loop, after = (
            builder.block,
            builder.append_basic_block("pairs"),
            builder.append_basic_block("summed"),
        )
        builder.branch(loop)
        builder.position_at_end(loop)
        pair = builder.phi(_I64)
        pair.add_incoming(_I64(0), before)
        held = [[builder.phi(SUMS) for _ in w] for _ in x]
        self._fetch(pair, w, *cgutils.unpack_tuple(builder, fetch))
        totals = self._step(pair, x, w, held)
        for held_row, row in zip(held, totals, strict=True):
            for phi, total in zip(held_row, row, strict=True):
                phi.add_incoming(ir.Constant(SUMS, [0.0] * COLUMNS), before)
                phi.add_incoming(total, loop)
        following = builder.add(pair, _I64(1))
        pair.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", following, num_pairs), loop, after)
        builder.position_at_end(after)
        for r, row in enumerate(totals):
            for b, total in enumerate(row):
                place = builder.gep(sums, [_I64((r * BLOCKS + b) * COLUMNS)], source_etype=F32)
                builder.store(total, builder.bitcast(place, SUMS.as_pointer()), align=4)

    def _fetch(self, pair: Any, w: list[Any], ahead: Any, pace: Any) -> None:
        builder = self._builder
        vectors = builder.lshr(builder.mul(pair, pace), _I64(_PACE.bit_length() - 1))
        distance = builder.add(ahead, builder.mul(vectors, _I64(4 * COLUMNS)))
        for block in w:
            place = builder.gep(block, [distance], source_etype=_I8)
            # Flags: read, into the nearest cache, data.
            builder.call(self._prefetch, [place, I32(0), I32(3), I32(1)])

    def _pointers(self, addresses: Any, count: int) -> list[Any]:
        builder = self._builder
        loads = [
            builder.load(builder.gep(addresses, [_I64(i)], source_etype=_I64), typ=_I64) for i in range(count)
        ]
        return [builder.inttoptr(load, _I8.as_pointer()) for load in loads]

    def _step(self, pair: Any, x: list[Any], w: list[Any], sums: list[list[Any]]) -> list[list[Any]]:
        """Adds one pair of k to the sums."""
        builder = self._builder
        factors = []
        for block in w:
            place = builder.gep(block, [builder.mul(pair, _I64(4 * COLUMNS))], source_etype=_I8)
            factors.append(builder.load(place, typ=UNITS, align=64))
        totals = []
        for row, row_sums in zip(x, sums, strict=True):
            pairs = spread(
                builder,
                builder.load(
                    builder.gep(row, [builder.mul(pair, _I64(4))], source_etype=_I8), typ=I32, align=2
                ),
            )
            totals.append(
                [multiply_add_halves(builder, s, pairs, f) for s, f in zip(row_sums, factors, strict=True)]
            )
        return totals


@_intrinsic(prefer_literal=True)
def _tile(typing_context, num_rows, sums, rows, blocks, num_pairs, fetch):
    """sums[r, 16 b + n] = sum over the pairs of row r times block b. ``rows`` and ``blocks`` hold
    addresses. Nothing is checked.
    """
    signature = types.void(num_rows, sums, rows, blocks, types.intp, types.UniTuple(types.intp, 2))

    def generate(context, builder, signature, arguments):
        arrays = zip(signature.args[1:4], arguments[1:4], strict=True)
        places = [context.make_array(kind)(context, builder, value).data for kind, value in arrays]
        _Tile(builder, num_rows.literal_value).generate(*places, *arguments[4:])
        return context.get_dummy_value()

    return signature, generate


@_intrinsic
def take_item(typing_context, counter):
    """Atomic counter[0]++: each thread gets another value."""
    signature = types.intp(counter)

    def generate(context, builder, signature, arguments):
        place = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.atomic_rmw("add", place, _I64(1), "monotonic")

    return signature, generate


@inner()
def multiply(num_rows, sums, rows, blocks, num_pairs, fetch):
    """One tile of 1 to 6 rows by four blocks: ``sums`` float32 [6, 64]; ``rows`` [6] and ``blocks``
    [4] are addresses; ``fetch`` comes from ``look_ahead``.
    """
    if num_rows == 1:
        _tile(1, sums, rows, blocks, num_pairs, fetch)
    elif num_rows == 2:
        _tile(2, sums, rows, blocks, num_pairs, fetch)
    elif num_rows == 3:
        _tile(3, sums, rows, blocks, num_pairs, fetch)
    elif num_rows == 4:
        _tile(4, sums, rows, blocks, num_pairs, fetch)
    elif num_rows == 5:
        _tile(5, sums, rows, blocks, num_pairs, fetch)
    else:
        _tile(6, sums, rows, blocks, num_pairs, fetch)


@njit(cache=True, inline="always")
def look_ahead(tile, tiles, num_inner, next_panel):
    """A tile's prefetch: distance in bytes from its blocks, and vectors to prefetch per 1024
    vectors read. The tiles of a panel share the prefetch of the next one, ``next_panel`` bytes
    away. At 16 to 64 rows a slot this is 9 to 26 % faster than leaving it all to the last tile. A
    panel of one tile prefetches itself.
    """
    if tiles == 1:
        return _AHEAD, _PACE
    return next_panel + num_inner // 2 * tile // tiles * 4 * COLUMNS, _PACE // tiles


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
            np.empty(ROWS, np.int64),
            np.empty(BLOCKS, np.int64),
        )
        item = take_item(counter)
        while item < panels * stretches:
            following = take_item(counter)
            stretch, panel = item // panels, item % panels
            start, length = part(stretch, stretches, len(y_TN))
            for b in range(BLOCKS):
                blocks[b] = w + min(panel * BLOCKS + b, num_blocks - 1) * block_bytes(num_inner)
            column = panel * BLOCKS * COLUMNS
            width = min(BLOCKS * COLUMNS, y_TN.shape[1] - column)
            tiles = parts(length, ROWS)
            for tile in range(tiles):
                first, num_rows = part(tile, tiles, length)
                first += start
                for r in range(num_rows):
                    rows[r] = x + (first + r) * x_stride
                next_panel = (following % panels - panel) * BLOCKS * block_bytes(num_inner)
                multiply(
                    num_rows,
                    sums,
                    rows,
                    blocks,
                    num_inner // 2,
                    look_ahead(tile, tiles, num_inner, next_panel),
                )
                for r in range(num_rows):
                    _write(
                        sums[r, :width],
                        bias_N[column : column + width],
                        y_TN[first + r, column : column + width],
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
