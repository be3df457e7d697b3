"""Tiles of products with weights in blocks (``blocks.py``): a few rows by one panel of four blocks,
summed in registers.

Float32 is multiplied and added as it is stored, and so is bf16 with AVX512-BF16. Elsewhere rows of
bf16 are widened to float32 once per stretch, and a vector of weights is widened in registers: its
even values by a shift of 16 bits, its odd ones by a mask. Either way k is added from first to last,
so the shape of a tile leaves no trace in a sum, and AVX2 and AVX-512 give the same bits.

With AMX, bf16 is multiplied by its tiles (``amx.py``).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import extending, njit
from numba.core import cgutils, types

from ... import cpu_isa
from ...cpu_isa import COLUMNS
from . import amx
from .arrays import inner
from .threads import part, parts
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
ROWS = 6  # per tile, without AMX
PACE = 1024  # fetches one vector per vector read

_AHEAD = 4096  # bytes to prefetch ahead in a panel that is read once, into the L2 cache: it waits there
_PIECE = 128  # units of four blocks are 32 KiB

_intrinsic: Any = extending.intrinsic  # typed as the definition, which also takes the compiler's context

_I8, _I64 = ir.IntType(8), ir.IntType(64)
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


@njit(cache=True, inline="always")
def look_ahead(tile, tiles, num_units, next_panel):
    """A tile's prefetch: distance in bytes from its blocks, and vectors to prefetch per 1024
    vectors read. The tiles of a panel share the prefetch of the next one, ``next_panel`` bytes
    away. At 16 to 64 rows a slot this is 9 to 26 % faster than leaving it all to the last tile. A
    panel of one tile prefetches itself.
    """
    if tiles == 1:
        return _AHEAD, PACE
    return next_panel + num_units * tile // tiles * 4 * COLUMNS, PACE // tiles


def multiply(
    num_rows: Any, sums: Any, rows: Any, blocks: Any, num_units: Any, next_panel: Any, like: Any
) -> None:
    """In kernels: rows by four blocks: ``sums`` float32 [at least the rows, rounded up to 16, 64];
    ``rows`` and ``blocks`` [4] are addresses, of rows as ``block_rows.lay_out`` leaves them;
    ``next_panel``: the bytes from these blocks to those multiplied next; ``like`` is an array of
    the rows' dtype.
    """
    raise NotImplementedError


@extending.overload(multiply)
def _multiply(num_rows, sums, rows, blocks, num_units, next_panel, like):
    return _by_amx if amx.multiplies(like) else _by_vectors


def _by_vectors(num_rows, sums, rows, blocks, num_units, next_panel, like):
    tiles = parts(num_rows, ROWS)
    for tile in range(tiles):
        first, length = part(tile, tiles, num_rows)
        fetch = look_ahead(tile, tiles, num_units, next_panel)
        _multiply_tile(length, sums[first:], rows[first:], blocks, num_units, fetch, like)


@inner()
def _multiply_tile(num_rows, sums, rows, blocks, num_units, fetch, like):
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


def _by_amx(num_rows, sums, rows, blocks, num_units, next_panel, like):
    """Several tiles of rows go through the blocks together, a piece after the other, which stays in
    the L1 cache.
    """
    tiles = parts(num_rows, amx.ROWS)
    piece = num_units if tiles == 1 else _PIECE
    for start in range(0, num_units, piece):
        units = min(piece, num_units - start)
        for tile in range(tiles):
            first = tile * amx.ROWS
            fetch = look_ahead(tile, tiles, units, next_panel)
            _amx_tile(sums[first:], rows[first:], blocks, start, units, fetch)


@_intrinsic
def _amx_tile(typing_context, sums, rows, blocks, start, num_units, fetch):
    """Adds units from ``start`` on."""
    signature = types.void(sums, rows, blocks, types.intp, types.intp, types.UniTuple(types.intp, 2))

    def generate(context, builder, signature, arguments):
        arrays = zip(signature.args[:3], arguments[:3], strict=True)
        places = [context.make_array(kind)(context, builder, value).data for kind, value in arrays]
        amx.Panels(builder).generate(*places, *arguments[3:])
        return context.get_dummy_value()

    return signature, generate
