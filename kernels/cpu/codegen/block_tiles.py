"""Tiles of products with weights in blocks (``blocks.py``): a few rows by one panel of four blocks,
summed in registers.

Float32 is multiplied and added as it is stored, and so is bf16 with AVX512-BF16. Elsewhere rows of
bf16 are widened to float32 once per stretch, and a vector of weights is widened in registers: its
even values by a shift of 16 bits, its odd ones by a mask. Either way k is added from first to last,
so the shape of a tile leaves no trace in a sum, and AVX2 and AVX-512 give the same bits.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import extending
from numba.core import cgutils, types

from ... import cpu_isa
from ...cpu_isa import COLUMNS
from .arrays import inner
from .vectors import (
    F32,
    I32,
    SUMS,
    UNITS,
    all_lanes,
    multiplies_bf16,
    multiply_add,
    multiply_add_halves,
    spread,
)

BLOCKS = 4  # per panel, read side by side
ROWS = 6  # per tile
PACE = 1024  # fetches one vector per vector read

_intrinsic: Any = extending.intrinsic  # typed as the definition, which also takes the compiler's context

_I8, _I16, _I64 = ir.IntType(8), ir.IntType(16), ir.IntType(64)
_HALVES = ir.VectorType(_I16, COLUMNS)
# 6 rows by 4 blocks are 24 sums; with 4 weights they use 28 of the 32 registers of AVX-512. AVX2
# has 16 of half the width: as many blocks at once as leave 4 to 12 sums.
_AT_ONCE_AVX2 = {1: 2, 2: 2}


_Blocks = tuple[list[Any], list[Any]]  # pointers, and the same again


def _blocks_at_once(num_rows: int) -> int:
    return BLOCKS if "avx512f" in cpu_isa.features() else _AT_ONCE_AVX2.get(num_rows, 1)


class _Tile:
    """Writes the instructions of one tile: ``num_rows`` rows of ``dtype`` by one panel."""

    def __init__(self, builder: Any, num_rows: int, dtype: Any) -> None:
        self._builder = builder
        self._num_rows = num_rows
        if dtype == types.float32:
            self._step = self._step_floats
        else:
            self._step = self._step_halves if multiplies_bf16() else self._step_widened
        self._prefetch = builder.module.declare_intrinsic(
            "llvm.prefetch.p0", (), ir.FunctionType(ir.VoidType(), (_I8.as_pointer(), I32, I32, I32))
        )

    def generate(self, sums: Any, rows: Any, blocks: Any, num_units: Any, fetch: Any) -> None:
        x, w = self._pointers(rows, self._num_rows), self._pointers(blocks, BLOCKS)
        fetch = cgutils.unpack_tuple(self._builder, fetch)
        step = _blocks_at_once(self._num_rows)
        for first in range(0, BLOCKS, step):
            totals = self._summed(x, w[first : first + step], num_units, fetch)
            for r, row in enumerate(totals):
                for b, total in enumerate(row):
                    self._store(total, sums, (r * BLOCKS + first + b) * COLUMNS)

    def _summed(self, x: list[Any], w: list[Any], num_units: Any, fetch: list[Any]) -> list[list[Any]]:
        builder = self._builder
        again = [self._hidden(block) for block in w]
        before = builder.block
        loop, after = builder.append_basic_block("units"), builder.append_basic_block("summed")
        builder.branch(loop)
        builder.position_at_end(loop)
        unit = builder.phi(_I64)
        unit.add_incoming(_I64(0), before)
        held = [[builder.phi(SUMS) for _ in w] for _ in x]
        self._fetch(unit, w, *fetch)
        totals = self._step(unit, x, (w, again), held)
        for held_row, row in zip(held, totals, strict=True):
            for phi, total in zip(held_row, row, strict=True):
                phi.add_incoming(all_lanes(SUMS, 0.0), before)
                phi.add_incoming(total, loop)
        following = builder.add(unit, _I64(1))
        unit.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", following, num_units), loop, after)
        builder.position_at_end(after)
        return totals

    def _store(self, total: Any, sums: Any, place: int) -> None:
        builder = self._builder
        target = builder.gep(sums, [_I64(place)], source_etype=F32)
        builder.store(total, builder.bitcast(target, SUMS.as_pointer()), align=4)

    def _fetch(self, unit: Any, w: list[Any], ahead: Any, pace: Any) -> None:
        builder = self._builder
        vectors = builder.lshr(builder.mul(unit, pace), _I64(PACE.bit_length() - 1))
        distance = builder.add(ahead, builder.mul(vectors, _I64(4 * COLUMNS)))
        for block in w:
            place = builder.gep(block, [distance], source_etype=_I8)
            # Flags: read, into the L2 cache, data. With L1, 6 rows took 1.5 times as long: so many
            # lines under way held the products up (AVX2 on 2 cores of an EPYC Genoa).
            builder.call(self._prefetch, [place, I32(0), I32(2), I32(1)])

    def _pointers(self, addresses: Any, count: int) -> list[Any]:
        builder = self._builder
        loads = [
            builder.load(builder.gep(addresses, [_I64(i)], source_etype=_I64), typ=_I64) for i in range(count)
        ]
        return [builder.inttoptr(load, _I8.as_pointer()) for load in loads]

    def _vectors(self, unit: Any, w: list[Any], kind: Any) -> list[Any]:
        """The unit of weights in each column of the blocks."""
        builder = self._builder
        offset = builder.mul(unit, _I64(4 * COLUMNS))
        places = [builder.gep(block, [offset], source_etype=_I8) for block in w]
        return [builder.load(place, typ=kind, align=64) for place in places]

    def _spread(self, row: Any, offset: Any, kind: Any, align: int) -> Any:
        """A value of a row in every lane."""
        place = self._builder.gep(row, [offset], source_etype=_I8)
        return spread(self._builder, self._builder.load(place, typ=kind, align=align))

    def _step_floats(self, unit: Any, x: list[Any], w: _Blocks, sums: list[list[Any]]) -> list[list[Any]]:
        """Adds one k to the sums."""
        return self._step_of(unit, x, w[0], sums, (SUMS, F32, 4, multiply_add))

    def _step_halves(self, unit: Any, x: list[Any], w: _Blocks, sums: list[list[Any]]) -> list[list[Any]]:
        """Adds one pair of k to the sums."""
        return self._step_of(unit, x, w[0], sums, (UNITS, I32, 2, multiply_add_halves))

    def _step_of(
        self, unit: Any, x: list[Any], w: list[Any], sums: list[list[Any]], given: tuple[Any, Any, int, Any]
    ) -> list[list[Any]]:
        vector, scalar, align, add = given
        factors = self._vectors(unit, w, vector)
        offset = self._builder.mul(unit, _I64(4))
        totals = []
        for row, row_sums in zip(x, sums, strict=True):
            value = self._spread(row, offset, scalar, align)
            totals.append([add(self._builder, s, value, f) for s, f in zip(row_sums, factors, strict=True)])
        return totals

    def _hidden(self, pointer: Any) -> Any:
        """The same pointer, but the compiler cannot tell."""
        return self._builder.asm(ir.FunctionType(pointer.type, (pointer.type,)), "", "=r,0", [pointer], False)

    def _step_widened(self, unit: Any, x: list[Any], w: _Blocks, sums: list[list[Any]]) -> list[list[Any]]:
        """Adds one pair of k, with rows of float32: the even k, then the odd. Each reads the units
        of weights itself, by a pointer of its own: to keep them would take registers that sums
        need.
        """
        builder = self._builder
        for odd in range(2):
            units = self._vectors(unit, w[odd], UNITS)
            if odd:
                bits = [builder.and_(each, all_lanes(UNITS, 0xFFFF0000)) for each in units]
            else:
                bits = [builder.shl(each, all_lanes(UNITS, 16)) for each in units]
            factors = [builder.bitcast(each, SUMS) for each in bits]
            offset = builder.add(builder.mul(unit, _I64(8)), _I64(4 * odd))
            totals = []
            for row, row_sums in zip(x, sums, strict=True):
                value = self._spread(row, offset, F32, 4)
                totals.append(
                    [multiply_add(builder, s, value, f) for s, f in zip(row_sums, factors, strict=True)]
                )
            sums = totals
        return sums


@_intrinsic(prefer_literal=True)
def _tile(typing_context, num_rows, sums, rows, blocks, num_units, fetch, like):
    """sums[r, 16 b + n] = sum over the units of row r times block b. ``rows`` and ``blocks`` hold
    addresses; rows are of the dtype of ``like``. Nothing is checked.
    """
    signature = types.void(num_rows, sums, rows, blocks, types.intp, types.UniTuple(types.intp, 2), like)

    def generate(context, builder, signature, arguments):
        arrays = zip(signature.args[1:4], arguments[1:4], strict=True)
        places = [context.make_array(kind)(context, builder, value).data for kind, value in arrays]
        _Tile(builder, num_rows.literal_value, like.dtype).generate(*places, *arguments[4:6])
        return context.get_dummy_value()

    return signature, generate


@inner()
def multiply(num_rows, sums, rows, blocks, num_units, fetch, like):
    """One tile of 1 to 6 rows by four blocks: ``sums`` float32 [6, 64]; ``rows`` and ``blocks`` [4]
    are addresses, of rows as ``lay_out`` leaves them; ``fetch`` comes from ``blocks.look_ahead``;
    ``like`` is an array of the rows' dtype.
    """
    if num_rows == 1:
        _tile(1, sums, rows, blocks, num_units, fetch, like)
    elif num_rows == 2:
        _tile(2, sums, rows, blocks, num_units, fetch, like)
    elif num_rows == 3:
        _tile(3, sums, rows, blocks, num_units, fetch, like)
    elif num_rows == 4:
        _tile(4, sums, rows, blocks, num_units, fetch, like)
    elif num_rows == 5:
        _tile(5, sums, rows, blocks, num_units, fetch, like)
    else:
        _tile(6, sums, rows, blocks, num_units, fetch, like)


# ----------------------------------------------------------------------- rows as tiles read them


def room_for_rows(num_rows: Any, num_units: Any, like: Any) -> Any:
    """In kernels: room for ``lay_out``, float32 [num_rows, K]; empty where tiles read rows as they
    are stored.
    """
    raise NotImplementedError


def lay_out(rows: Any, num_rows: Any, room: Any, like: Any) -> None:
    """In kernels: makes rows of the dtype of ``like`` readable for tiles. ``rows`` holds their
    addresses; they become those of rows widened in ``room``, unless tiles read them as they are.
    """
    raise NotImplementedError


def _widens(like: Any) -> bool:
    return like.dtype != types.float32 and not multiplies_bf16()


@extending.overload(room_for_rows, inline="always")
def _room_for_rows(num_rows, num_units, like):
    if _widens(like):
        return lambda num_rows, num_units, like: np.empty((num_rows, 2 * num_units), np.float32)
    return lambda num_rows, num_units, like: np.empty((0, 0), np.float32)


@extending.overload(lay_out)
def _lay_out(rows, num_rows, room, like):
    if not _widens(like):
        return lambda rows, num_rows, room, like: None

    def widened(rows, num_rows, room, like):
        for r in range(num_rows):
            _widen_row(rows[r], room.shape[1], room, r)
            rows[r] = room[r].ctypes.data

    return widened


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
