"""Products by the tiles of Intel's AMX ("Intel 64 and IA-32 Architectures Software Developer's
Manual", volume 1, chapter 18): sixteen rows by weights in blocks, or by units of keys and values.

A block is what TDPBF16PS takes as its second factor: 16 units of 16 columns are one tile of 1 KiB.
Rows are laid out by 32 values, so that each tile of theirs is 1 KiB in one piece, too. The last
tile of rows that are more than sixteen has undefined ones: a row leaves no trace in another. For
any number of rows, k is summed from first to last, 32 at a time: in each, the even and the odd
values for themselves, as the instruction does.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import ctypes
import os
from typing import Any

from llvmlite import ir
from numba import extending
from numba.core import cgutils, types

from ... import cpu_isa
from .vectors import F32, Rows, spread

ROWS = 16  # of a tile, at most
UNITS = 16  # of a tile: pairs of bf16
VALUES = 2 * UNITS  # of a row of a tile
TILE_BYTES = 1024
ROW_BYTES = 64

_intrinsic: Any = extending.intrinsic  # typed as the definition, which also takes the compiler's context

_I8, _I32, _I64, _VOID = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.VoidType()
_POINTER = _I8.as_pointer()
_LINE = ir.VectorType(_I32, UNITS)
_BLOCKS = 4
_ROW_TILE, _BLOCK_TILES = 4, (5, 6, 7)  # tile registers; 0 to 3 are sums

# Palette 1, and all eight registers 16 rows of 64 bytes. The first five, of rows and their sums,
# may have fewer.
_CONFIGURATION = bytes([1, *[0] * 15, *[ROW_BYTES, 0] * 8, *[0] * 16, *[ROWS] * 8, *[0] * 8])
_ROWS_AT, _NUM_ROW_TILES = 48, 5

_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XTILEDATA = 158, 0x1023, 18


def ask_for_tiles() -> None:
    """Asks Linux for the registers of AMX, for this process, its threads and those that it forks.
    Raises RuntimeError if they are refused.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XTILEDATA):
        reason = os.strerror(ctypes.get_errno())
        raise RuntimeError(f"Linux refuses AMX ({reason}): set cluster.isa = avx512_bf16")


def used() -> bool:
    """Whether this process multiplies bf16 by AMX."""
    return cpu_isa.here() == "amx"


def multiplies(like: Any) -> bool:
    """Whether this process multiplies rows of the dtype of ``like``, numba's type of an array, by
    AMX.
    """
    return like.dtype == types.uint16 and used()


class Panels:
    """Writes the instructions of sixteen rows by one panel."""

    def __init__(self, builder: Any) -> None:
        self._builder = builder

    def generate(self, sums: Any, rows: Any, blocks: Any, start: Any, num_units: Any, fetch: Any) -> None:
        """``sums`` float32 [16, 64]: of the units before ``start``, a multiple of 16; the addresses
        of the first row, laid out, and of the blocks; ``fetch``: as in ``block_tiles.look_ahead``.
        """
        builder = self._builder
        begun = builder.mul(builder.lshr(start, _I64(4)), _I64(TILE_BYTES))
        x, *w = (
            self._at(self._pointer(*place), begun)
            for place in [(rows, 0), *((blocks, b) for b in range(_BLOCKS))]
        )
        ahead, pace = cgutils.unpack_tuple(builder, fetch)
        places = [self._at(builder.bitcast(sums, _POINTER), _I64(b * ROW_BYTES)) for b in range(_BLOCKS)]
        with builder.if_else(builder.icmp_signed("==", start, _I64(0))) as (first, later):
            with first:
                for b in range(_BLOCKS):
                    self._call("tilezero", [_I8(b)])
            with later:
                for b, place in enumerate(places):
                    self._call("tileloadd64", [_I8(b), place, _I64(_BLOCKS * ROW_BYTES)])
        full = builder.lshr(num_units, _I64(4))
        with cgutils.for_range(builder, full) as loop:
            self._fetch(loop.index, w, ahead, pace)
            offset = builder.mul(loop.index, _I64(TILE_BYTES))
            self._add(self._at(x, offset), [self._at(block, offset) for block in w])
        rest = builder.and_(num_units, _I64(UNITS - 1))
        with builder.if_then(builder.icmp_signed(">", rest, _I64(0)), likely=False):
            offset = builder.mul(full, _I64(TILE_BYTES))
            self._add(self._at(x, offset), [self._padded(self._at(block, offset), rest) for block in w])
        for b, place in enumerate(places):
            self._call("tilestored64", [_I8(b), place, _I64(_BLOCKS * ROW_BYTES)])

    def _add(self, x: Any, w: list[Any]) -> None:
        self._call("tileloadd64", [_I8(_ROW_TILE), x, _I64(ROW_BYTES)])
        for b, block in enumerate(w):
            held = _I8(_BLOCK_TILES[b % len(_BLOCK_TILES)])
            self._call("tileloadd64", [held, block, _I64(ROW_BYTES)])
            self._call("tdpbf16ps", [_I8(b), _I8(_ROW_TILE), held])

    def _fetch(self, tile: Any, w: list[Any], ahead: Any, pace: Any) -> None:
        """Fetches the share of vectors that belongs to a tile of each block."""
        builder = self._builder
        units = builder.mul(builder.mul(tile, _I64(UNITS)), pace)
        first = builder.lshr(units, _I64(10))
        last = builder.lshr(builder.add(units, builder.mul(pace, _I64(UNITS))), _I64(10))
        prefetch = builder.module.declare_intrinsic(
            "llvm.prefetch.p0", (), ir.FunctionType(_VOID, (_POINTER, _I32, _I32, _I32))
        )
        with cgutils.for_range_slice(builder, first, last, _I64(1)) as (vector, _):
            distance = builder.add(ahead, builder.mul(vector, _I64(ROW_BYTES)))
            for block in w:  # flags: read, into the L2 cache, data
                builder.call(prefetch, [self._at(block, distance), _I32(0), _I32(2), _I32(1)])

    def _padded(self, block: Any, num_units: Any) -> Any:
        """A tile of the last units of a block, with zeros after them: what follows in memory is
        another block's, or nobody's.
        """
        builder = self._builder
        room = cgutils.alloca_once(builder, ir.ArrayType(_I8, TILE_BYTES + ROW_BYTES))
        address = builder.add(builder.ptrtoint(room, _I64), _I64(ROW_BYTES - 1))
        place = builder.inttoptr(builder.and_(address, _I64(-ROW_BYTES)), _POINTER)
        cgutils.memset(builder, place, _I64(TILE_BYTES), 0)
        cgutils.raw_memcpy(builder, place, block, builder.mul(num_units, _I64(ROW_BYTES)), 1)
        return place

    def _pointer(self, addresses: Any, index: int) -> Any:
        place = self._builder.gep(addresses, [_I64(index)], source_etype=_I64)
        return self._builder.inttoptr(self._builder.load(place, typ=_I64), _POINTER)

    def _at(self, pointer: Any, offset: Any) -> Any:
        return self._builder.gep(pointer, [offset], source_etype=_I8)

    def _call(self, name: str, arguments: list[Any]) -> None:
        _call(self._builder, name, arguments)


def begin_tiles(like: Any, num_rows: Any) -> None:
    """In kernels: readies the tile registers of this thread for ``num_rows`` rows, or for 16 if
    there are more, if rows of the dtype of ``like`` are multiplied by AMX.
    """
    raise NotImplementedError


def end_tiles(like: Any) -> None:
    """In kernels: ends what ``begin_tiles`` began; threads without tiles are switched faster."""
    raise NotImplementedError


@extending.overload(begin_tiles, inline="always")
def _begin_tiles(like, num_rows):
    if multiplies(like):
        return lambda like, num_rows: _configure(min(num_rows, ROWS))
    return lambda like, num_rows: None


@extending.overload(end_tiles, inline="always")
def _end_tiles(like):
    return (lambda like: _release()) if multiplies(like) else (lambda like: None)


@_intrinsic
def _configure(typing_context, num_rows):
    def generate(context, builder, signature, arguments):
        kind = ir.ArrayType(_I8, len(_CONFIGURATION))
        place = cgutils.alloca_once(builder, kind)
        builder.store(ir.Constant(kind, bytearray(_CONFIGURATION)), place)
        rows = builder.trunc(arguments[0], _I8)
        for tile in range(_NUM_ROW_TILES):
            builder.store(rows, cgutils.gep_inbounds(builder, place, 0, _ROWS_AT + tile))
        _call(builder, "ldtilecfg", [builder.bitcast(place, _POINTER)])
        return context.get_dummy_value()

    return types.void(types.intp), generate


@_intrinsic
def _release(typing_context):
    def generate(context, builder, signature, arguments):
        _call(builder, "tilerelease", [])
        return context.get_dummy_value()

    return types.void(), generate


@_intrinsic
def lay_out_row(typing_context, source, num_units, target):
    """Copies the row at address ``source``: each 16 units to ``target`` and to every 1024 bytes
    after it, and zeros up to 16 after the last.
    """
    signature = types.void(types.intp, types.intp, types.intp)

    def generate(context, builder, signature, arguments):
        source, num_units, target = arguments
        x, out = (builder.inttoptr(address, _POINTER) for address in (source, target))

        def at(pointer, index, size):
            return builder.gep(pointer, [builder.mul(index, _I64(size))], source_etype=_I8)

        full = builder.lshr(num_units, _I64(4))
        with cgutils.for_range(builder, full) as loop:
            line = builder.load(at(x, loop.index, ROW_BYTES), typ=_LINE, align=2)
            place = builder.bitcast(at(out, loop.index, TILE_BYTES), _LINE.as_pointer())
            builder.store(line, place, align=ROW_BYTES)
        rest = builder.and_(num_units, _I64(UNITS - 1))
        with builder.if_then(builder.icmp_signed(">", rest, _I64(0)), likely=False):
            place = at(out, full, TILE_BYTES)
            builder.store(
                ir.Constant(_LINE, None), builder.bitcast(place, _LINE.as_pointer()), align=ROW_BYTES
            )
            cgutils.raw_memcpy(builder, place, at(x, full, ROW_BYTES), builder.mul(rest, _I64(4)), 1)
        return context.get_dummy_value()

    return signature, generate


@_intrinsic
def multiply_units(typing_context, out, a, a_row, b):
    """out[r, n] = the sum over u of a[a_row + r, u] times b[u, n], for the rows r of a tile and 64
    columns n. a [., U], b [U, 64]: units, with U a multiple of 16; out: float32.
    """
    signature = types.void(out, a, types.intp, b)

    def generate(context, builder, signature, arguments):
        sums, factors, units = (_Tiles(context, builder, signature.args[i], arguments[i]) for i in (0, 1, 3))
        for n in range(_BLOCKS):
            _call(builder, "tilezero", [_I8(n)])
        with cgutils.for_range_slice(builder, _I64(0), factors.num_columns, _I64(UNITS)) as (unit, _):
            factors.load(_ROW_TILE, arguments[2], unit)
            for n in range(_BLOCKS):
                held = _BLOCK_TILES[n % len(_BLOCK_TILES)]
                units.load(held, unit, _I64(n * UNITS))
                _call(builder, "tdpbf16ps", [_I8(n), _I8(_ROW_TILE), _I8(held)])
        for n in range(_BLOCKS):
            sums.store(n, _I64(0), _I64(n * UNITS))
        return context.get_dummy_value()

    return signature, generate


@_intrinsic
def add_units(typing_context, out, out_row, num_rows, shrink, a, b):
    """out[out_row + r, n] = shrink[r] times its old value, plus the sum over u of a[r, u] times
    b[u, n], for the rows r of a tile and all columns n, of which ``b`` and ``out`` have a multiple
    of 16. Rows from ``num_rows`` on do not shrink. a [16, 32], b [32, N]: units; out, shrink:
    float32.
    """
    signature = types.void(out, types.intp, types.intp, shrink, a, b)

    def generate(context, builder, signature, arguments):
        sums, factors, units = (_Tiles(context, builder, signature.args[i], arguments[i]) for i in (0, 4, 5))
        _shrink(context, builder, signature, arguments, units.num_columns)
        weights = (2, 3)
        for half, tile in enumerate(weights):
            factors.load(tile, _I64(0), _I64(half * UNITS))
        with cgutils.for_range_slice(builder, _I64(0), units.num_columns, _I64(UNITS)) as (column, _):
            sums.load(0, arguments[1], column)
            for half, tile in enumerate(weights):
                units.load(6 + half, _I64(half * UNITS), column)
                _call(builder, "tdpbf16ps", [_I8(0), _I8(tile), _I8(6 + half)])
            sums.store(0, arguments[1], column)
        return context.get_dummy_value()

    return signature, generate


def _shrink(context: Any, builder: Any, signature: Any, arguments: Any, num_columns: Any) -> None:
    """Multiplies rows by their factors; few of them are not 1, once a row has met its largest
    score.
    """
    held, factors = (Rows(context, builder, signature.args[i], arguments[i]) for i in (0, 3))
    with cgutils.for_range(builder, arguments[2]) as loop:
        factor = factors.load(None, loop.index, 1)
        with builder.if_then(builder.fcmp_unordered("!=", factor, F32(1.0)), likely=False):
            row, lanes = builder.add(arguments[1], loop.index), spread(builder, factor)
            with cgutils.for_range_slice(builder, _I64(0), num_columns, _I64(UNITS)) as (column, _):
                held.store(builder.fmul(held.load(row, column), lanes), row, column)


class _Tiles:
    """A matrix of units or float32 in which tiles lie."""

    def __init__(self, context: Any, builder: Any, array_type: Any, array: Any) -> None:
        parts = context.make_array(array_type)(context, builder, array)
        self._builder, self._data = builder, builder.bitcast(parts.data, _POINTER)
        self._stride = cgutils.unpack_tuple(builder, parts.strides)[0]
        self.num_columns = cgutils.unpack_tuple(builder, parts.shape)[1]

    def load(self, tile: int, row: Any, column: Any) -> None:
        _call(self._builder, "tileloadd64", [_I8(tile), self._place(row, column), self._stride])

    def store(self, tile: int, row: Any, column: Any) -> None:
        _call(self._builder, "tilestored64", [_I8(tile), self._place(row, column), self._stride])

    def _place(self, row: Any, column: Any) -> Any:
        builder = self._builder
        offset = builder.add(builder.mul(row, self._stride), builder.mul(column, _I64(4)))
        return builder.gep(self._data, [offset], source_etype=_I8)


def _call(builder: Any, name: str, arguments: list[Any]) -> None:
    kind = ir.FunctionType(_VOID, tuple(argument.type for argument in arguments))
    builder.call(builder.module.declare_intrinsic(f"llvm.x86.{name}", (), kind), arguments)


if cpu_isa.here() == "amx":
    ask_for_tiles()
