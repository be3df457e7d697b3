"""LLVM instructions for the innermost loops of compiled kernels, on vectors of 16 float32 or any
other type in 16 lanes.

Numbers are float32, bf16 as uint16, or e4m3 as uint8. Instructions are chosen for the processor
that compiles; numba's cache keeps processors apart. With AVX512-BF16 the processor multiplies and
rounds bf16 itself, others use integer arithmetic.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.np import arrayobj

from ... import cpu_isa

LANES = 16

F32, _I8, I32 = ir.FloatType(), ir.IntType(8), ir.IntType(32)
SUMS = ir.VectorType(F32, LANES)
UNITS = ir.VectorType(I32, LANES)
_KINDS = {
    types.float32: F32,
    types.int64: ir.IntType(64),
    types.uint32: I32,
    types.uint16: ir.IntType(16),
    types.uint8: _I8,
}
_SHIFTS = {types.float32: 2, types.int64: 3, types.uint32: 2, types.uint16: 1, types.uint8: 0}


class _Bfloat(ir.types.Type):  # type: ignore[misc]
    """LLVM's bfloat type, which llvmlite lacks."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Bfloat)

    def __hash__(self) -> int:
        return hash(_Bfloat)


_HALVES = ir.VectorType(_Bfloat(), 2 * LANES)


def multiplies_bf16() -> bool:
    """Whether the processor has AVX512-BF16."""
    return "avx512bf16" in cpu_isa.features()


def is_matrix(array: Any, *dtypes: Any) -> bool:
    """Whether a type is a two-dimensional array of one of the dtypes."""
    return isinstance(array, types.Array) and array.ndim == 2 and array.dtype in dtypes


class Rows:
    """An array of one or two dimensions with contiguous rows; read as ``dtype`` if one is given."""

    def __init__(self, context: Any, builder: Any, array_type: Any, array: Any, dtype: Any = None) -> None:
        parts = arrayobj.make_array(array_type)(context, builder, array)
        self._builder, self._dtype = builder, dtype or array_type.dtype
        self._data = builder.bitcast(parts.data, _I8.as_pointer())
        self._stride = cgutils.unpack_tuple(builder, parts.strides)[0]
        self.num_columns = cgutils.unpack_tuple(builder, parts.shape)[-1]

    def load(self, row: Any, column: Any, lanes: int = LANES) -> Any:
        """Loads values as stored; one lane gives a scalar."""
        return self._builder.load(self._place(row, column, lanes), align=self._align())

    def store(self, value: Any, row: Any, column: Any) -> None:
        lanes = value.type.count if isinstance(value.type, ir.VectorType) else 1
        self._builder.store(value, self._place(row, column, lanes), align=self._align())

    def load_numbers(self, row: Any, column: Any) -> Any:
        """Loads 16 numbers as float32."""
        raw = self.load(row, column)
        if self._dtype == types.float32:
            return raw
        if self._dtype == types.uint16:
            return self._builder.bitcast(
                self._builder.shl(self._builder.zext(raw, UNITS), all_lanes(UNITS, 16)), SUMS
            )
        moved = self._builder.shl(self._builder.sext(raw, UNITS), all_lanes(UNITS, 20))
        small = self._builder.bitcast(self._builder.and_(moved, all_lanes(UNITS, 0x87F00000)), SUMS)
        return self._builder.fmul(small, all_lanes(SUMS, 2.0**120))

    def store_numbers(self, value: Any, row: Any, column: Any) -> None:
        """Stores 16 float32, rounded to nearest, ties to even."""
        self.store(value if self._dtype == types.float32 else _to_bf16(self._builder, value), row, column)

    def prefetch(self, row: Any, column: Any) -> None:
        kind = ir.FunctionType(ir.VoidType(), (_I8.as_pointer(), I32, I32, I32))
        function = self._builder.module.declare_intrinsic("llvm.prefetch.p0", (), kind)
        place = self._builder.bitcast(self._place(row, column, 1), _I8.as_pointer())
        self._builder.call(function, [place, I32(0), I32(2), I32(1)])

    def _align(self) -> int:
        return 1 << _SHIFTS[self._dtype]

    def _place(self, row: Any, column: Any, lanes: int) -> Any:
        offset = self._builder.shl(column, ir.Constant(column.type, _SHIFTS[self._dtype]))
        if row is not None:
            offset = self._builder.add(self._builder.mul(row, self._stride), offset)
        kind = _KINDS[self._dtype]
        target = kind if lanes == 1 else ir.VectorType(kind, lanes)
        return self._builder.bitcast(self._builder.gep(self._data, [offset]), target.as_pointer())


def all_lanes(vector: Any, value: Any) -> Any:
    """A constant in every lane."""
    return ir.Constant(vector, [value] * vector.count)


def spread(builder: Any, value: Any, lanes: int = LANES) -> Any:
    """A scalar copied to every lane."""
    nothing = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    first = builder.insert_element(nothing, value, ir.Constant(I32, 0))
    return builder.shuffle_vector(first, nothing, ir.Constant(ir.VectorType(I32, lanes), [0] * lanes))


def multiply_add(builder: Any, total: Any, a: Any, b: Any) -> Any:
    """total + a * b, float32."""
    return builder.fadd(total, builder.fmul(a, b, flags=("contract",)), flags=("contract",))


def multiply_add_halves(builder: Any, total: Any, a: Any, b: Any) -> Any:
    """total + the products of both bf16 in each lane of a and b, which are uint32."""
    if multiplies_bf16():
        kind = ir.FunctionType(SUMS, (SUMS, _HALVES, _HALVES))
        product = builder.module.declare_intrinsic("llvm.x86.avx512bf16.dpbf16ps.512", (), kind)
        return builder.call(product, [total, builder.bitcast(a, _HALVES), builder.bitcast(b, _HALVES)])
    low = (builder.bitcast(builder.shl(x, all_lanes(UNITS, 16)), SUMS) for x in (a, b))
    high = (builder.bitcast(builder.and_(x, all_lanes(UNITS, 0xFFFF0000)), SUMS) for x in (a, b))
    return multiply_add(builder, multiply_add(builder, total, *low), *high)


def larger(builder: Any, a: Any, b: Any) -> Any:
    """Lane-wise maximum; b where either is NaN."""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def over_lanes(builder: Any, combine: Any, rows: list[Any]) -> Any:
    """Combines the 16 lanes of each of 4 vectors: a vector of 4. Lane i is combined with i + 8,
    then with i + 4, i + 2 and i + 1, for all rows at once.
    """

    def pick(a: Any, b: Any, lanes: list[int]) -> Any:
        return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))

    def halved(a: Any, b: Any, width: int) -> Any:
        """The lower and the upper half of each group of lanes, combined: those of a, then of b."""
        lower = [lane for lane in range(2 * LANES) if not lane & width]
        return combine(builder, pick(a, b, lower), pick(a, b, [lane | width for lane in lower]))

    a, b, c, d = rows
    joined = halved(halved(a, b, LANES // 2), halved(c, d, LANES // 2), LANES // 4)
    for distance in (2, 1):
        joined = combine(builder, joined, pick(joined, joined, [lane ^ distance for lane in range(LANES)]))
    return pick(joined, joined, list(range(0, LANES, LANES // 4)))


def total(builder: Any, vector: Any) -> Any:
    """Sum of all lanes."""
    return _call(builder, "llvm.vector.reduce.fadd", F32, [ir.Constant(F32, 0.0), vector], ("reassoc",))


def exp2(builder: Any, x: Any) -> Any:
    """Vectorized 2^x for x at most 126, within 2 units in the last place; below -126 it is 2^-126,
    or with AVX-512 what it is, or 0.
    """
    if not _scales():
        least = all_lanes(x.type, -126.0)
        x = builder.select(builder.fcmp_ordered("<", x, least), least, x)
    whole, rest = _split(builder, x)
    y = all_lanes(x.type, 1.535336188319500e-4)  # the polynomial of Cephes' exp2f
    for factor in (
        1.339887440266574e-3,
        9.618437357674640e-3,
        5.550332471162809e-2,
        2.402264791363012e-1,
        6.931472028550421e-1,
        1.0,
    ):
        y = multiply_add(builder, all_lanes(x.type, factor), y, rest)
    return _times_power(builder, y, whole)


def silu(builder: Any, x: Any) -> Any:
    """Vectorized x / (1 + e^-x), within 9 units in the last place from -10 to 10, within 62 from
    -80 to 80 (of 2.6 million draws); below -87 it nears 0 no further.
    """
    most = all_lanes(x.type, 126.0)
    power = builder.fmul(x, all_lanes(x.type, -1.4426950408889634))
    power = builder.select(builder.fcmp_ordered(">", power, most), most, power)
    return builder.fdiv(x, builder.fadd(all_lanes(x.type, 1.0), exp2(builder, power)))


def _scales() -> bool:
    return cpu_isa.features() >= {"avx512f", "avx512dq", "avx512vl"}


def _split(builder: Any, x: Any) -> tuple[Any, Any]:
    """The nearest whole number, and the rest: 0 if x is infinite and the CPU has AVX-512."""
    if not _scales():
        whole = _call(builder, "llvm.rint", x.type, [x])
        return whole, builder.fsub(x, whole)
    nearest = I32(8)  # no bits after the point, rounded to nearest, without exceptions
    rest = _masked(builder, "reduce", x.type, [x, nearest], x)
    return builder.fsub(x, rest), rest


def _times_power(builder: Any, y: Any, whole: Any) -> Any:
    """y times 2^whole."""
    if _scales():
        return _masked(builder, "scalef", y.type, [y, whole], y)
    integers = ir.VectorType(I32, y.type.count)
    exponent = builder.shl(builder.fptosi(whole, integers), all_lanes(integers, 23))
    return builder.bitcast(builder.add(builder.bitcast(y, integers), exponent), y.type)


def _masked(builder: Any, name: str, result: Any, arguments: list[Any], old: Any) -> Any:
    """Calls one of AVX-512's intrinsics that take a mask, for all lanes."""
    count = result.count
    mask = ir.IntType(max(count, 8))
    arguments = [*arguments, old, mask(-1)]
    if count == LANES:
        arguments.append(I32(4))  # rounds as this thread does
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    function = builder.module.declare_intrinsic(f"llvm.x86.avx512.mask.{name}.ps.{32 * count}", (), kind)
    return builder.call(function, arguments)


def _call(builder: Any, name: str, result: Any, arguments: list[Any], flags: tuple[str, ...] = ()) -> Any:
    """Calls an LLVM intrinsic overloaded for the type of the last argument, a vector."""
    kinds = [argument.type for argument in arguments]
    function = builder.module.declare_intrinsic(
        f"{name}.v{kinds[-1].count}f32", (), ir.FunctionType(result, kinds)
    )
    return builder.call(function, arguments, fastmath=flags)


def _to_bf16(builder: Any, value: Any) -> Any:
    """Bits of 16 float32 rounded to bf16."""
    if multiplies_bf16():
        halves = builder.fptrunc(value, ir.VectorType(_Bfloat(), LANES))
        return builder.bitcast(halves, ir.VectorType(_KINDS[types.uint16], LANES))
    bits = builder.bitcast(value, UNITS)
    odd = builder.and_(builder.lshr(bits, all_lanes(UNITS, 16)), all_lanes(UNITS, 1))
    rounded = builder.add(builder.add(bits, all_lanes(UNITS, 0x7FFF)), odd)
    return builder.trunc(
        builder.lshr(rounded, all_lanes(UNITS, 16)), ir.VectorType(_KINDS[types.uint16], LANES)
    )
