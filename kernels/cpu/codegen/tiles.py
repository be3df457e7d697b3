"""Operations on small matrices for compiled kernels, each a handful of vector instructions. Nothing
is checked.

A unit is the piece of the inner dimension that one lane of a product takes: two neighbouring bf16
(an array of uint32), multiplied exactly and summed in float32, or one float32.

R rows  U units  N columns
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.errors import TypingError
from numba.extending import intrinsic

from ... import cpu_isa
from .vectors import (
    I32,
    LANES,
    SUMS,
    UNITS,
    Rows,
    all_lanes,
    exp2,
    is_matrix,
    larger,
    multiply_add,
    multiply_add_halves,
    over_lanes,
    spread,
)

_INDEX = ir.IntType(64)  # types.intp
_intrinsic: Any = intrinsic  # typed as the definition, which also takes the compiler's context

TILE_ROWS = 4
# With 4 rows: 16 sums, enough to keep both units of a core busy, and all of them in registers.
TILE_COLUMNS = 64


def _vectors_at_once() -> int:
    """Vectors of 16 columns whose sums, for 4 rows, fit the registers: AVX-512 has 32 of them, AVX2
    16 of half the width.
    """
    return TILE_COLUMNS // LANES if "avx512f" in cpu_isa.features() else 1


@_intrinsic(prefer_literal=True)
def add_product(typing_context, out, out_row, shrink, a, a_row, b, column, num_vectors):
    """out[out_row + r, column + n] = shrink[r] times its old value, plus the sum over u of a[a_row
    + r, u] * b[u, column + n], for 4 rows r and 16 ``num_vectors`` columns n. If ``shrink`` is
    None, the old value is dropped. a [., U], b [U, .]: units; out, shrink: float32.
    """
    if not (
        is_matrix(out, types.float32) and is_matrix(a, types.uint32, types.float32) and is_matrix(b, a.dtype)
    ):
        raise TypingError("add_product takes a float32 matrix and two matrices of units")
    signature = types.void(out, types.intp, shrink, a, types.intp, b, types.intp, num_vectors)
    vectors = range(num_vectors.literal_value)

    def generate(context, builder, signature, arguments):
        _, out_row, _, _, a_row, _, column, _ = arguments
        out_rows, a_rows, b_rows = (
            Rows(context, builder, signature.args[i], arguments[i]) for i in (0, 3, 5)
        )
        multiply = _multiply_of(a.dtype)
        factors_r = None if shrink == types.none else Rows(context, builder, shrink, arguments[2])
        for begin in range(0, num_vectors.literal_value, _vectors_at_once()):
            some = vectors[begin : begin + _vectors_at_once()]
            columns = [_plus(builder, column, v * LANES) for v in some]
            sums = [[cgutils.alloca_once(builder, SUMS) for _ in some] for _ in range(TILE_ROWS)]
            for r, row in enumerate(sums):
                for v, place in enumerate(row):
                    before = all_lanes(SUMS, 0.0)
                    if factors_r is not None:
                        factor = spread(builder, factors_r.load(None, _index(r), 1))
                        before = builder.fmul(out_rows.load(_plus(builder, out_row, r), columns[v]), factor)
                    builder.store(before, place)
            with cgutils.for_range(builder, a_rows.num_columns) as loop:
                factors = [b_rows.load(loop.index, own) for own in columns]
                for r, row in enumerate(sums):
                    unit = spread(builder, a_rows.load(_plus(builder, a_row, r), loop.index, 1))
                    for v, place in enumerate(row):
                        builder.store(multiply(builder, builder.load(place), unit, factors[v]), place)
            for r, row in enumerate(sums):
                for v, place in enumerate(row):
                    out_rows.store(builder.load(place), _plus(builder, out_row, r), columns[v])
        return context.get_dummy_value()

    return signature, generate


class Places:
    """The rows that an operation reads. ``places``, if not None, is int64 [., N]: first the rows
    of N positions, then those to fetch meanwhile into the L2 cache. Without it, positions are rows.
    """

    def __init__(self, context: Any, builder: Any, places_type: Any, places: Any) -> None:
        self._builder = builder
        self._rows = None if places_type == types.none else Rows(context, builder, places_type, places)

    def load(self, source: Rows, position: Any, column: Any, lanes: int = LANES) -> Any:
        """Loads values of a position, and fetches the same values of the row to come."""
        if self._rows is None:
            return source.load(position, column, lanes)
        source.prefetch(self._rows.load(_index(1), position, 1), column)
        return source.load(self._rows.load(_index(0), position, 1), column, lanes)


def are_places(places: Any) -> bool:
    """Whether a type is that of ``places``."""
    return places == types.none or is_matrix(places, types.int64)


@_intrinsic
def transpose(typing_context, rows, places, first, column, out, out_row, out_column):
    """out[out_row + i, out_column + j] = unit ``column`` + i of position ``first`` + j, for 16 i
    and 16 j. ``rows`` holds numbers, bf16 as uint16, of the positions ``places``.
    """
    unit = _unit(rows)
    if not (is_matrix(rows, types.uint16, types.float32) and are_places(places) and is_matrix(out, unit)):
        raise TypingError("transpose takes a matrix of numbers, places and a matrix of units")
    signature = types.void(rows, places, types.intp, types.intp, out, types.intp, types.intp)

    def generate(context, builder, signature, arguments):
        _, _, first, column, _, out_row, out_column = arguments
        source, target = (Rows(context, builder, signature.args[i], arguments[i], unit) for i in (0, 4))
        own = Places(context, builder, places, arguments[1])
        for i, vector in enumerate(_turned(builder, source, own, first, column)):
            target.store(vector, _plus(builder, out_row, i), out_column)
        return context.get_dummy_value()

    return signature, generate


@_intrinsic
def multiply_turned(typing_context, out, a, a_row, rows, places, first, column):
    """out[r, first + j] = the sum over u of a[a_row + r, u] times unit ``column`` + u of position
    ``first`` + j, for 4 rows r and 16 j: ``transpose`` and ``add_product`` in one, to the bit.
    """
    unit = _unit(rows)
    if not (is_matrix(out, types.float32) and is_matrix(a, unit) and are_places(places)):
        raise TypingError("multiply_turned takes a float32 matrix, units, numbers and their places")
    signature = types.void(out, a, types.intp, rows, places, types.intp, types.intp)

    def generate(context, builder, signature, arguments):
        _, _, a_row, _, _, first, column = arguments
        out_rows, a_rows = (Rows(context, builder, signature.args[i], arguments[i]) for i in (0, 1))
        source = Rows(context, builder, rows, arguments[3], unit)
        own = Places(context, builder, places, arguments[4])
        multiply = _multiply_of(unit)
        sums = [cgutils.alloca_once(builder, SUMS) for _ in range(TILE_ROWS)]
        for place in sums:
            builder.store(all_lanes(SUMS, 0.0), place)
        with cgutils.for_range_slice(builder, _index(0), a_rows.num_columns, _index(LANES)) as (begin, _):
            vectors = _turned(builder, source, own, first, builder.add(column, begin))
            for i, vector in enumerate(vectors):
                for r, place in enumerate(sums):
                    one = a_rows.load(_plus(builder, a_row, r), _plus(builder, begin, i), 1)
                    total = multiply(builder, builder.load(place), spread(builder, one), vector)
                    builder.store(total, place)
        for r, place in enumerate(sums):
            out_rows.store(builder.load(place), _index(r), first)
        return context.get_dummy_value()

    return signature, generate


def _unit(rows: Any) -> Any:
    return types.uint32 if rows.dtype == types.uint16 else types.float32


def _multiply_of(unit: Any) -> Any:
    return multiply_add_halves if unit == types.uint32 else multiply_add


def _turned(builder: Any, source: Rows, places: Places, first: Any, column: Any) -> list[Any]:
    """16 units of 16 positions, one vector for each unit."""
    return transposed(builder, [places.load(source, _plus(builder, first, j), column) for j in range(LANES)])


def transposed(builder: Any, vectors: list[Any]) -> list[Any]:
    """Transposes 16 vectors of 16 units."""
    for width in (1, 2, 4, 8):  # exchanges quadrants of blocks twice as wide
        vectors = [
            _exchange(builder, vectors[i & ~width], vectors[i | width], width, bool(i & width))
            for i in range(LANES)
        ]
    return vectors


def _exchange(builder: Any, upper: Any, lower: Any, width: int, second: bool) -> Any:
    """The upper or the lower row of a pair after the exchange: bit ``width`` of lane l says which
    row it comes from.
    """
    lanes = [
        (lane | width if second else lane & ~width) + (LANES if lane & width else 0) for lane in range(LANES)
    ]
    return builder.shuffle_vector(upper, lower, ir.Constant(UNITS, lanes))


@_intrinsic
def pair(typing_context, rows, places, first, column, out, out_row, out_column):
    """out[out_row, out_column + i] = the unit of numbers ``column`` + i of positions ``first`` and
    ``first`` + 1, for 32 i of bf16.
    """
    if not (is_matrix(rows, types.uint16) and are_places(places) and is_matrix(out, types.uint32)):
        raise TypingError("pair takes bf16, its places and a matrix of units")
    signature = types.void(rows, places, types.intp, types.intp, out, types.intp, types.intp)

    def generate(context, builder, signature, arguments):
        _, _, first, column, _, out_row, out_column = arguments
        source, target = (Rows(context, builder, signature.args[i], arguments[i]) for i in (0, 4))
        own = Places(context, builder, places, arguments[1])
        for i, vector in enumerate(_paired(builder, source, own, first, column, 2)):
            target.store(vector, out_row, _plus(builder, out_column, i * LANES))
        return context.get_dummy_value()

    return signature, generate


@_intrinsic
def add_paired(typing_context, out, out_row, shrink, a, rows, places, column, out_column):
    """out[out_row + r, out_column + n] = shrink[r] times its old value, plus the sum over u of a[r,
    u] times unit u of number ``column`` + n, for 4 rows r and 64 columns n: ``pair`` and
    ``add_product`` in one, to the bit. A unit is that of two positions of bf16, or one of float32.
    """
    unit = _unit(rows)
    if not (is_matrix(out, types.float32) and is_matrix(a, unit) and are_places(places)):
        raise TypingError("add_paired takes a float32 matrix, units, numbers and their places")
    signature = types.void(out, types.intp, shrink, a, rows, places, types.intp, types.intp)

    def generate(context, builder, signature, arguments):
        _, out_row, _, _, _, _, column, out_column = arguments
        out_rows, shrink_r, a_rows, source = (
            Rows(context, builder, signature.args[i], arguments[i]) for i in (0, 2, 3, 4)
        )
        own = Places(context, builder, places, arguments[5])
        multiply, step = _multiply_of(unit), _vectors_at_once()
        for begin in range(0, TILE_COLUMNS // LANES, step):
            columns = [_plus(builder, out_column, (begin + v) * LANES) for v in range(step)]
            sums = [[cgutils.alloca_once(builder, SUMS) for _ in columns] for _ in range(TILE_ROWS)]
            for r, row in enumerate(sums):
                factor = spread(builder, shrink_r.load(None, _index(r), 1))
                for place, at in zip(row, columns, strict=True):
                    before = out_rows.load(_plus(builder, out_row, r), at)
                    builder.store(builder.fmul(before, factor), place)
            here = _plus(builder, column, begin * LANES)
            with cgutils.for_range(builder, a_rows.num_columns) as loop:
                factors = _unit_row(builder, source, own, loop.index, here, step, unit)
                for r, row in enumerate(sums):
                    one = spread(builder, a_rows.load(_index(r), loop.index, 1))
                    for place, vector in zip(row, factors, strict=True):
                        builder.store(multiply(builder, builder.load(place), one, vector), place)
            for r, row in enumerate(sums):
                for place, at in zip(row, columns, strict=True):
                    out_rows.store(builder.load(place), _plus(builder, out_row, r), at)
        return context.get_dummy_value()

    return signature, generate


def _unit_row(
    builder: Any, source: Rows, places: Places, number: Any, column: Any, count: int, unit: Any
) -> list[Any]:
    """``count`` vectors of units of row ``number``."""
    if unit == types.uint32:
        return _paired(builder, source, places, builder.shl(number, _index(1)), column, count)
    return [places.load(source, number, _plus(builder, column, v * LANES)) for v in range(count)]


def _paired(builder: Any, source: Rows, places: Places, first: Any, column: Any, count: int) -> list[Any]:
    """``count`` vectors of units, one or an even number of them, from numbers of two positions."""
    vectors, at_once = [], min(count, 2)
    for v in range(0, count, at_once):
        width = at_once * LANES
        upper, lower = (
            places.load(source, _plus(builder, first, n), _plus(builder, column, v * LANES), width)
            for n in range(2)
        )
        for half in range(at_once):
            lanes = [half * LANES + lane // 2 + lane % 2 * width for lane in range(2 * LANES)]
            both = builder.shuffle_vector(upper, lower, ir.Constant(ir.VectorType(I32, 2 * LANES), lanes))
            vectors.append(builder.bitcast(both, UNITS))
    return vectors


@_intrinsic
def move(typing_context, source, row, column, scale, out, out_row, out_column):
    """Moves 16 numbers of a row, times ``scale``, rounded to the dtype of ``out``. Numbers of the
    same dtype are copied without the factor.
    """
    numbers = types.float32, types.uint16, types.uint8
    if not (is_matrix(source, *numbers) and is_matrix(out, *numbers[:2])):
        raise TypingError("move takes two matrices of numbers")
    signature = types.void(source, types.intp, types.intp, types.float32, out, types.intp, types.intp)

    def generate(context, builder, signature, arguments):
        _, row, column, scale, _, out_row, out_column = arguments
        source_rows, out_rows = (Rows(context, builder, signature.args[i], arguments[i]) for i in (0, 4))
        if source.dtype == out.dtype:
            out_rows.store(source_rows.load(row, column), out_row, out_column)
        else:
            value = source_rows.load_numbers(row, column)
            out_rows.store_numbers(builder.fmul(value, spread(builder, scale)), out_row, out_column)
        return context.get_dummy_value()

    return signature, generate


@_intrinsic
def soften(typing_context, scores, first, factor, scales, best, sums, row, shares, shrink):
    """One step of a running softmax over the next 64 scores of 4 rows r from ``first`` on:
    shares[r] = 2^(factor * (scores[r] - largest so far)). ``best`` and ``sums`` hold the largest
    score and the sum of row ``row`` + r - ``first``; shrink[r] is the factor by which earlier sums
    shrink. ``scales`` [2, 64], if not None, multiply scores (except -inf) beforehand and shares
    afterwards; sums exclude them.
    """
    if not (is_matrix(scores, types.float32) and is_matrix(shares, types.float32, types.uint16)):
        raise TypingError("soften takes float32 scores and a matrix of numbers")
    signature = types.void(scores, types.intp, types.float32, scales, best, sums, types.intp, shares, shrink)
    columns = range(0, TILE_COLUMNS, LANES)

    def generate(context, builder, signature, arguments):
        _, first, factor, _, _, _, row, _, _ = arguments
        score_rows, best_r, sum_r, share_rows, shrink_r = (
            Rows(context, builder, signature.args[i], arguments[i]) for i in (0, 4, 5, 7, 8)
        )
        scale_rows = None if scales == types.none else Rows(context, builder, scales, arguments[3])
        rows = [_plus(builder, first, r) for r in range(TILE_ROWS)]
        vectors_r = [[score_rows.load(here, _index(n)) for n in columns] for here in rows]
        if scale_rows is not None:
            scales_n = [scale_rows.load(_index(0), _index(n)) for n in columns]
            vectors_r = [
                [_scaled_but_infinite(builder, *each) for each in zip(vectors, scales_n, strict=True)]
                for vectors in vectors_r
            ]
        before = best_r.load(None, row, TILE_ROWS)
        largest = over_lanes(builder, larger, [_tree(builder, larger, vectors) for vectors in vectors_r])
        most, factors = larger(builder, before, largest), spread(builder, factor)
        totals = []
        for r, (here, vectors) in enumerate(zip(rows, vectors_r, strict=True)):
            own = _lane(builder, most, r)
            parts = [exp2(builder, builder.fmul(builder.fsub(each, own), factors)) for each in vectors]
            totals.append(_tree(builder, _sum, parts))
            for n, part in zip(columns, parts, strict=True):
                if scale_rows is not None:
                    part = builder.fmul(part, scale_rows.load(_index(1), _index(n)))
                share_rows.store_numbers(part, here, _index(n))
        change = builder.fmul(builder.fsub(before, most), spread(builder, factor, TILE_ROWS))
        left, added = exp2(builder, change), over_lanes(builder, _sum, totals)
        best_r.store(most, None, row)
        sum_r.store(multiply_add(builder, added, sum_r.load(None, row, TILE_ROWS), left), None, row)
        shrink_r.store(left, None, first)
        return context.get_dummy_value()

    return signature, generate


def _scaled_but_infinite(builder: Any, vector: Any, scale: Any) -> Any:
    """Scales all values except -inf."""
    hidden = builder.fcmp_ordered("==", vector, all_lanes(SUMS, float("-inf")))
    return builder.select(hidden, vector, builder.fmul(vector, scale))


def _lane(builder: Any, vector: Any, lane: int) -> Any:
    """One lane of 4, in 16."""
    return builder.shuffle_vector(vector, vector, ir.Constant(UNITS, [lane] * LANES))


def _sum(builder: Any, a: Any, b: Any) -> Any:
    return builder.fadd(a, b)


def _tree(builder: Any, combine: Any, values: list[Any]) -> Any:
    """Combines all values, pair by pair."""
    while len(values) > 1:
        values = [
            combine(builder, *values[i : i + 2]) if i + 1 < len(values) else values[i]
            for i in range(0, len(values), 2)
        ]
    return values[0]


def _index(value: int) -> Any:
    return ir.Constant(_INDEX, value)


def _plus(builder: Any, value: Any, constant: int) -> Any:
    return builder.add(value, _index(constant))
