"""Rows as tiles of products with weights in blocks read them (``block_tiles.py``, ``amx.py``), and
their results as they leave.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import extending
from numba.core import cgutils, types

from ...cpu_isa import COLUMNS
from . import amx
from .arrays import inner
from .threads import parts
from .vectors import F32, I32, SUMS, UNITS, Rows, all_lanes, multiplies_bf16, silu

_intrinsic: Any = extending.intrinsic  # typed as the definition, which also takes the compiler's context

_I8, _I16, _I64 = ir.IntType(8), ir.IntType(16), ir.IntType(64)
_HALVES = ir.VectorType(_I16, COLUMNS)


def room_for_rows(num_rows: Any, num_units: Any, like: Any) -> Any:
    """In kernels: room for ``lay_out``; empty where tiles read rows as they are stored."""
    raise NotImplementedError


def lay_out(rows: Any, num_rows: Any, num_units: Any, room: Any, like: Any) -> None:
    """In kernels: makes rows of the dtype of ``like`` readable for tiles. ``rows`` holds their
    addresses; they become those of rows in ``room``, unless tiles read them as they are.
    """
    raise NotImplementedError


def _widens(like: Any) -> bool:
    return like.dtype != types.float32 and not multiplies_bf16()


@extending.overload(room_for_rows, inline="always")
def _room_for_rows(num_rows, num_units, like):
    if amx.multiplies(like):
        return _room_for_tiles
    if _widens(like):
        return lambda num_rows, num_units, like: np.empty((num_rows, 2 * num_units), np.float32)
    return lambda num_rows, num_units, like: np.empty((0, 0), np.float32)


def _room_for_tiles(num_rows, num_units, like):
    """One row more than tiles take, since they begin at a multiple of 64 bytes."""
    rows = (num_rows + amx.ROWS - 1) // amx.ROWS * amx.ROWS
    units = (num_units + amx.UNITS - 1) // amx.UNITS * amx.UNITS
    return np.empty((rows + 1, units), np.uint32)


@extending.overload(lay_out)
def _lay_out(rows, num_rows, num_units, room, like):
    if amx.multiplies(like):
        return _as_tiles
    if not _widens(like):
        return lambda rows, num_rows, num_units, room, like: None

    def widened(rows, num_rows, num_units, room, like):
        for r in range(num_rows):
            _widen_row(rows[r], room.shape[1], room, r)
            rows[r] = room[r].ctypes.data

    return widened


def _as_tiles(rows, num_rows, num_units, room, like):
    place = (room.ctypes.data + 63) // 64 * 64
    for r in range(num_rows):
        amx.lay_out_row(rows[r], num_units, place)
        rows[r] = place
        last = r % amx.ROWS == amx.ROWS - 1
        place += 4 * amx.ROWS * room.shape[1] - 64 * (amx.ROWS - 1) if last else 64


@_intrinsic
def _widen_row(typing_context, source, num_inner, room, row):
    """room[row] = the bf16 at address ``source``, as float32."""
    signature = types.void(types.intp, types.intp, room, types.intp)

    def generate(context, builder, signature, arguments):
        address, num_inner, room_value, row = arguments
        target = context.make_array(room)(context, builder, room_value)
        stride = cgutils.unpack_tuple(builder, target.strides)[0]
        out = builder.gep(
            builder.bitcast(target.data, _I8.as_pointer()), [builder.mul(row, stride)], source_etype=_I8
        )
        x = builder.inttoptr(address, _I8.as_pointer())
        full = builder.and_(num_inner, _I64(-COLUMNS))
        with cgutils.for_range_slice(builder, _I64(0), full, _I64(COLUMNS)) as (index, _):
            _widen(builder, x, out, index, (_HALVES, UNITS, SUMS))
        with cgutils.for_range_slice(builder, full, num_inner, _I64(1)) as (index, _):
            _widen(builder, x, out, index, (_I16, I32, F32))
        return context.get_dummy_value()

    return signature, generate


def _widen(builder: Any, x: Any, out: Any, index: Any, kinds: tuple[Any, Any, Any]) -> None:
    half, bits, number = kinds
    place = builder.gep(x, [builder.mul(index, _I64(2))], source_etype=_I8)
    target = builder.gep(out, [builder.mul(index, _I64(4))], source_etype=_I8)
    sixteen = all_lanes(bits, 16) if isinstance(bits, ir.VectorType) else bits(16)
    wide = builder.shl(builder.zext(builder.load(place, typ=half, align=2), bits), sixteen)
    builder.store(builder.bitcast(wide, number), builder.bitcast(target, number.as_pointer()), align=4)


# ------------------------------------------------------------------ rows between two products


def room_between(num_rows: Any, num_stretches: Any, width: Any, like: Any) -> Any:
    """In kernels: room for the bf16 results [M, width] of a product whose rows are those of the
    next. With AMX they lie as its tiles read them, 16 rows by 32 values, [., 32], and each stretch
    begins with a tile.
    """
    raise NotImplementedError


def stride_between(width: Any, room: Any) -> Any:
    """In kernels: the bytes from one result to the next, 0 if they lie in tiles."""
    raise NotImplementedError


def first_between(start: Any, stretch: Any, room: Any) -> Any:
    """In kernels: the row at which a stretch begins, whose first pair is ``start``."""
    raise NotImplementedError


def place_between(row: Any, column: Any, width: Any, room: Any) -> Any:
    """In kernels: the row and column of ``room`` at which a result lies; ``column`` is a multiple
    of 32.
    """
    raise NotImplementedError


@extending.overload(room_between)
def _room_between(num_rows, num_stretches, width, like):
    if not amx.multiplies(like):
        return lambda num_rows, num_stretches, width, like: np.empty((num_rows, width), np.uint16)

    def in_tiles(num_rows, num_stretches, width, like):
        rows = first_between(num_rows, num_stretches, like) * parts(width, amx.VALUES)
        room = np.empty((rows + 1) * amx.VALUES, np.uint16)
        if width % amx.VALUES:
            room[:] = 0  # multiplied by zeros, and must be numbers
        skip = -room.ctypes.data % 64 // 2
        return room[skip : skip + rows * amx.VALUES].reshape(rows, amx.VALUES)

    return in_tiles


@extending.overload(stride_between, inline="always")
def _stride_between(width, room):
    return (lambda width, room: 0) if amx.multiplies(room) else (lambda width, room: 2 * width)


@extending.overload(first_between, inline="always")
def _first_between(start, stretch, room):
    if amx.multiplies(room):
        # Rounded up, and a tile for each stretch before, which may have begun one of its own.
        return lambda start, stretch, room: (parts(start, amx.ROWS) + stretch) * amx.ROWS
    return lambda start, stretch, room: start


@extending.overload(place_between, inline="always")
def _place_between(row, column, width, room):
    if amx.multiplies(room):
        return _place_in_tiles
    return lambda row, column, width, room: (row, column)


def _place_in_tiles(row, column, width, room):
    tile = row // amx.ROWS * parts(width, amx.VALUES) + column // amx.VALUES
    return tile * amx.ROWS + row % amx.ROWS, 0


@inner()
def find_between(room, first, num_units, rows):
    """Writes the addresses of results in tiles, from ``first`` on; ``room``: that of the first."""
    across = parts(num_units, amx.UNITS) * amx.TILE_BYTES
    for r in range(len(rows)):
        rows[r] = room + (first + r) // amx.ROWS * across + (first + r) % amx.ROWS * amx.ROW_BYTES


# --------------------------------------------------------------------------------------- results


@_intrinsic
def write_row(typing_context, sums, row, bias, bias_row, y, place, column, num_columns):
    """y[place, column:] = sums[row] + bias[bias_row, column:], of ``num_columns``, a multiple of
    16. ``sums`` float32; ``y`` and ``bias`` bf16 as uint16, or float32; no bias if that is empty.
    With loops over slices a product of 16 rows, 64 columns and 32 inner values took 546 instead of
    310 ns (one thread of a Xeon with AMX).
    """
    signature = types.void(sums, types.intp, bias, types.intp, y, types.intp, types.intp, types.intp)

    def generate(context, builder, signature, arguments):
        sums, row, bias, bias_row, y, place, column, num_columns = arguments
        kinds = signature.args
        totals, biases, out = (
            Rows(context, builder, kind, value)
            for kind, value in zip((kinds[0], kinds[2], kinds[4]), (sums, bias, y), strict=True)
        )
        biased = builder.icmp_signed(">", biases.num_columns, _I64(0))
        room = cgutils.alloca_once(builder, SUMS)
        with cgutils.for_range_slice(builder, _I64(0), num_columns, _I64(COLUMNS)) as (index, _):
            builder.store(totals.load(row, index), room, align=64)
            with builder.if_then(biased, likely=False):
                more = biases.load_numbers(bias_row, builder.add(column, index))
                builder.store(builder.fadd(builder.load(room, align=64), more), room, align=64)
            out.store_numbers(builder.load(room, align=64), place, builder.add(column, index))
        return context.get_dummy_value()

    return signature, generate


@_intrinsic
def write_silu_row(typing_context, sums, row, y, place, column, num_columns):
    """y[place, column:] = silu(sums[row]) times the same row 32 columns on, of ``num_columns``, a
    multiple of 16. ``sums`` float32; ``y`` bf16 as uint16.
    """
    signature = types.void(sums, types.intp, y, types.intp, types.intp, types.intp)

    def generate(context, builder, signature, arguments):
        sums, row, y, place, column, num_columns = arguments
        totals, out = (
            Rows(context, builder, kind, value)
            for kind, value in ((signature.args[0], sums), (signature.args[2], y))
        )
        with cgutils.for_range_slice(builder, _I64(0), num_columns, _I64(COLUMNS)) as (index, _):
            gate, up = totals.load(row, index), totals.load(row, builder.add(index, _I64(2 * COLUMNS)))
            out.store_numbers(builder.fmul(silu(builder, gate), up), place, builder.add(column, index))
        return context.get_dummy_value()

    return signature, generate
