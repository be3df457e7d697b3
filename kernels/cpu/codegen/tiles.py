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
    largest,
    multiply_add,
    multiply_add_halves,
    spread,
    total,
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
        multiply = multiply_add_halves if a.dtype == types.uint32 else multiply_add
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


@_intrinsic
def transpose(typing_context, rows, row, column, out, out_row, out_column):
    """out[out_row + i, out_column + j] = unit ``column`` + i of rows[row + j], for 16 i and 16 j.
    ``rows`` holds numbers, bf16 as uint16.
    """
    unit = types.uint32 if rows.dtype == types.uint16 else types.float32
    if not (is_matrix(rows, types.uint16, types.float32) and is_matrix(out, unit)):
        raise TypingError("transpose takes a matrix of numbers and one of units")
    signature = types.void(rows, types.intp, types.intp, out, types.intp, types.intp)

    def generate(context, builder, signature, arguments):
        _, row, column, _, out_row, out_column = arguments
        source, target = (Rows(context, builder, signature.args[i], arguments[i], unit) for i in (0, 3))
        vectors = [source.load(_plus(builder, row, j), column) for j in range(LANES)]
        for i, vector in enumerate(transposed(builder, vectors)):
            target.store(vector, _plus(builder, out_row, i), out_column)
        return context.get_dummy_value()

    return signature, generate


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
def pair(typing_context, rows, row, column, out, out_row, out_column):
    """out[out_row, out_column + i] = the unit of rows[row, column + i] and rows[row + 1, column +
    i], for 32 i of bf16.
    """
    if not (is_matrix(rows, types.uint16) and is_matrix(out, types.uint32)):
        raise TypingError("pair takes bf16 and a matrix of units")
    signature = types.void(rows, types.intp, types.intp, out, types.intp, types.intp)

    def generate(context, builder, signature, arguments):
        _, row, column, _, out_row, out_column = arguments
        source, target = (Rows(context, builder, signature.args[i], arguments[i]) for i in (0, 3))
        upper, lower = (source.load(_plus(builder, row, n), column, 2 * LANES) for n in range(2))
        for half in range(2):
            lanes = [half * LANES + lane // 2 + lane % 2 * 2 * LANES for lane in range(2 * LANES)]
            both = builder.shuffle_vector(upper, lower, ir.Constant(ir.VectorType(I32, 2 * LANES), lanes))
            target.store(builder.bitcast(both, UNITS), out_row, _plus(builder, out_column, half * LANES))
        return context.get_dummy_value()

    return signature, generate


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
def prefetch(typing_context, rows, row, column):
    """Prefetches the cache line of a value."""
    signature = types.void(rows, types.intp, types.intp)

    def generate(context, builder, signature, arguments):
        Rows(context, builder, rows, arguments[0]).prefetch(*arguments[1:])
        return context.get_dummy_value()

    return signature, generate


@_intrinsic
def soften(typing_context, scores, factor, scales, best, sums, row, shares, shrink):
    """One step of a running softmax over the next 64 scores of 4 rows: shares[r] = 2^(factor *
    (scores[r] - largest so far)). ``best`` and ``sums`` hold the largest score and the sum of row
    ``row`` + r; shrink[r] is the factor by which earlier sums shrink. ``scales`` [2, 64], if not
    None, multiply scores (except -inf) beforehand and shares afterwards; sums exclude them.
    """
    if not (is_matrix(scores, types.float32) and is_matrix(shares, types.float32, types.uint16)):
        raise TypingError("soften takes float32 scores and a matrix of numbers")
    signature = types.void(scores, types.float32, scales, best, sums, types.intp, shares, shrink)
    columns = range(0, TILE_COLUMNS, LANES)

    def generate(context, builder, signature, arguments):
        _, factor, _, _, _, row, _, _ = arguments
        score_rows, best_r, sum_r, share_rows, shrink_r = (
            Rows(context, builder, signature.args[i], arguments[i]) for i in (0, 3, 4, 6, 7)
        )
        scale_rows = None if scales == types.none else Rows(context, builder, scales, arguments[2])
        for r in range(TILE_ROWS):
            own = _plus(builder, row, r)
            vectors = [score_rows.load(_index(r), _index(n)) for n in columns]
            if scale_rows is not None:
                pairs = zip(vectors, (scale_rows.load(_index(0), _index(n)) for n in columns), strict=True)
                vectors = [_scaled_but_infinite(builder, vector, scale) for vector, scale in pairs]
            before = best_r.load(None, own, 1)
            most = larger(builder, before, largest(builder, _tree(builder, larger, vectors)))
            factors, mosts = spread(builder, factor), spread(builder, most)
            parts = [exp2(builder, builder.fmul(builder.fsub(vector, mosts), factors)) for vector in vectors]
            for n, part in zip(columns, parts, strict=True):
                share = (
                    part if scale_rows is None else builder.fmul(part, scale_rows.load(_index(1), _index(n)))
                )
                share_rows.store_numbers(share, _index(r), _index(n))
            change = builder.fmul(builder.fsub(before, most), factor)
            left = builder.extract_element(exp2(builder, spread(builder, change, 4)), I32(0))
            sum_of_parts = total(builder, _tree(builder, lambda builder, a, b: builder.fadd(a, b), parts))
            for array, value in (
                (best_r, most),
                (sum_r, multiply_add(builder, sum_of_parts, sum_r.load(None, own, 1), left)),
            ):
                array.store(value, None, own)
            shrink_r.store(left, None, _index(r))
        return context.get_dummy_value()

    return signature, generate


def _scaled_but_infinite(builder: Any, vector: Any, scale: Any) -> Any:
    """Scales all values except -inf."""
    hidden = builder.fcmp_ordered("==", vector, all_lanes(SUMS, float("-inf")))
    return builder.select(hidden, vector, builder.fmul(vector, scale))


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
