"""Products of bf16 rows with weights in 4 bits, decoded in registers.

A vector of 64 bytes holds 128 codes of one weight row. Shifted by 4 n bits, its 16-bit lanes look
up values 4 w + n for 32 w in a table of bf16: the rows of x are arranged in the same order
(``arranged``), and two neighbouring lanes are a unit of a product. A unit's sum belongs to 8
neighbouring values, so 4 or 2 of the 16 sums share a scale, which is applied once per vector. This
takes AVX512-BF16.

Scales tell their kind by the dtype of their array: bf16 as uint16, fp16 as int16, E8M0 as uint8,
E4M3 as int8. E8M0 and E4M3 go with E2M1 codes, the others with int4.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import struct
from typing import Any

from llvmlite import ir
from numba import njit
from numba.core import cgutils, types
from numba.core.errors import TypingError
from numba.extending import intrinsic

from ... import cpu_isa
from ...formats.four_bit_format import INT4, MXFP4
from .arrays import inner, stay_apart
from .vectors import (
    F32,
    I32,
    LANES,
    SUMS,
    UNITS,
    all_lanes,
    multiply_add,
    multiply_add_halves,
    spread,
    total,
)

AT_ONCE = 128  # codes per vector
BLOCK = 32  # weight rows, or pairs of them, that a thread takes at once
ROWS = 6  # per tile: 12 sums, 12 totals and 2 decoded vectors use 26 of the 32 registers

_I8, _I16, _I64 = ir.IntType(8), ir.IntType(16), ir.IntType(64)
_BYTES, _CODES = ir.VectorType(_I8, 4 * LANES), ir.VectorType(_I16, 2 * LANES)
NUM_FIELDS = 9  # of ``weight_rows``
SCALES = {types.uint16: 4, types.int16: 4, types.uint8: 4, types.int8: 8}  # per vector of codes
_E2M1 = (types.uint8, types.int8)

_intrinsic: Any = intrinsic  # typed as the definition, which also takes the compiler's context


@njit(cache=True, inline="always")
def arranged(k):
    """The place of value k of a row of x."""
    return k // AT_ONCE * AT_ONCE + k % 4 * (2 * LANES) + k % AT_ONCE // 4


@_intrinsic(prefer_literal=True)
def _tile(typing_context, num_rows, rows, scales, weights, out):
    """out[w, r, i] = weight row i of run w (of two) times row r. ``rows``: addresses. ``scales``:
    any array of the dtype. ``weights``: what ``weight_rows`` returns. Nothing is checked.
    """
    if not isinstance(num_rows, types.IntegerLiteral) or scales.dtype not in SCALES:
        raise TypingError("takes a literal number of rows, and scales of a known kind")
    signature = types.void(num_rows, rows, scales, types.UniTuple(types.intp, NUM_FIELDS), out)

    def generate(context, builder, signature, arguments):
        _, rows_value, _, fields, out_value = arguments
        place = context.make_array(signature.args[1])(context, builder, rows_value).data
        sums = context.make_array(signature.args[4])(context, builder, out_value).data
        tile = _Tile(builder, num_rows.literal_value, scales.dtype)
        tile.generate(place, cgutils.unpack_tuple(builder, fields, NUM_FIELDS), sums)
        return context.get_dummy_value()

    return signature, generate


class _Tile:
    """Writes the instructions of pairs of weight rows by ``num_rows`` rows."""

    def __init__(self, builder: Any, num_rows: int, scale_dtype: Any) -> None:
        self._builder, self._num_rows, self._dtype = builder, num_rows, scale_dtype
        kind = ir.FunctionType(_CODES, (_CODES, _CODES))
        self._look_up = builder.module.declare_intrinsic("llvm.x86.avx512.permvar.hi.512", (), kind)
        bits = [bf16_bits(number) for number in code_numbers(scale_dtype)]
        # Twice: a look-up reads five bits, the fifth of which is the next code's.
        self._table = ir.Constant(_CODES, bits * 2)

    def generate(self, rows: Any, fields: list[Any], out: Any) -> None:
        builder = self._builder
        codes, codes_gap, codes_step, scales, scales_gap, scales_step, count, num_bytes, groups = fields
        places = [builder.gep(rows, [_I64(r)], source_etype=_I64) for r in range(self._num_rows)]
        x = [pointer(builder, builder.load(place, typ=_I64)) for place in places]
        full, rest = builder.lshr(num_bytes, _I64(6)), builder.and_(num_bytes, _I64(63))
        masks = self._masks(rest, builder.sub(groups, builder.mul(full, _I64(SCALES[self._dtype]))))
        totals = [[cgutils.alloca_once(builder, SUMS) for _ in x] for _ in range(2)]
        with cgutils.for_range(builder, count) as row:
            begun_codes, begun_scales = (
                [
                    pointer(builder, plus(builder, base, builder.mul(row.index, step), gap if w else None))
                    for w in range(2)
                ]
                for base, gap, step in ((codes, codes_gap, codes_step), (scales, scales_gap, scales_step))
            )
            for place in (place for pair in totals for place in pair):
                builder.store(all_lanes(SUMS, 0.0), place)
            with cgutils.for_range(builder, full) as loop:
                self._step(loop.index, x, begun_codes, begun_scales, totals, None)
            with cgutils.if_unlikely(builder, builder.icmp_signed(">", rest, _I64(0))):
                self._step(full, x, begun_codes, begun_scales, totals, masks)
            for w, pair in enumerate(totals):
                for r, place in enumerate(pair):
                    index = builder.add(row.index, _I64((w * ROWS + r) * BLOCK))
                    target = builder.gep(out, [index], source_etype=F32)
                    builder.store(total(builder, builder.load(place, typ=SUMS)), target)

    def _masks(self, num_bytes: Any, num_scales: Any) -> tuple[Any, Any]:
        """The lanes of the last vector of codes, and of its scales."""
        builder, found = self._builder, []
        for count, lanes in ((num_bytes, 64), (num_scales, SCALES[self._dtype])):
            numbers = ir.VectorType(_I8, lanes)
            most = spread(builder, builder.trunc(count, _I8), lanes)
            found.append(builder.icmp_unsigned("<", ir.Constant(numbers, list(range(lanes))), most))
        return found[0], found[1]

    def _step(
        self, index: Any, x: list[Any], codes: list[Any], scales: list[Any], totals: Any, masks: Any
    ) -> None:
        """Adds one vector of codes of each weight row."""
        builder = self._builder
        offset, mask = builder.mul(index, _I64(64)), None if masks is None else masks[0]
        loaded = [self._load(row, offset, _BYTES, mask) for row in codes]
        vectors = [builder.bitcast(bits, _CODES) for bits in loaded]
        sums = [[all_lanes(SUMS, 0.0) for _ in x] for _ in codes]
        for n in range(4):
            decoded = []
            for vector in vectors:
                moved = builder.lshr(vector, all_lanes(_CODES, 4 * n)) if n else vector
                looked_up = builder.call(self._look_up, [self._table, moved])
                decoded.append(builder.bitcast(looked_up, UNITS))
            for r, row in enumerate(x):
                place = builder.add(builder.mul(index, _I64(256)), _I64(64 * n))
                units = self._load(row, place, UNITS, None)
                for w, values in enumerate(decoded):
                    sums[w][r] = multiply_add_halves(builder, sums[w][r], values, units)
        for w, row in enumerate(scales):
            factors = self._scales(row, index, None if masks is None else masks[1])
            for r, place in enumerate(totals[w]):
                added = multiply_add(builder, builder.load(place, typ=SUMS), sums[w][r], factors)
                builder.store(added, place)

    def _load(self, base: Any, offset: Any, kind: Any, mask: Any) -> Any:
        """A vector, or those lanes of it that are in ``mask``, the others 0."""
        builder = self._builder
        place = builder.gep(base, [offset], source_etype=_I8)
        place = builder.bitcast(place, kind.as_pointer())
        if mask is None:
            return builder.load(place, typ=kind, align=1)
        name = f"llvm.masked.load.v{kind.count}i{kind.element.width}.p0"
        function = ir.FunctionType(kind, (kind.as_pointer(), I32, mask.type, kind))
        load = builder.module.declare_intrinsic(name, (), function)
        return builder.call(load, [place, I32(1), mask, all_lanes(kind, 0)])

    def _scales(self, row: Any, index: Any, mask: Any) -> Any:
        """The scales of a vector of codes, float32, one for each of its 16 sums."""
        builder, count = self._builder, SCALES[self._dtype]
        item = scale_item(self._dtype)
        offset = builder.mul(index, _I64(count * item.width // 8))
        values = scale_numbers(
            builder, self._dtype, self._load(row, offset, ir.VectorType(item, count), mask)
        )
        lanes = [lane * count // LANES for lane in range(LANES)]
        return builder.shuffle_vector(values, values, ir.Constant(UNITS, lanes))


def code_numbers(scale_dtype: Any) -> tuple[float, ...]:
    """The numbers of codes 0 to 15 that go with this kind of scales; exact in bf16."""
    return (MXFP4 if scale_dtype in _E2M1 else INT4).numbers


def bf16_bits(number: float) -> int:
    """The bits of a number that is exact in bf16."""
    bits: int = struct.unpack("<I", struct.pack("<f", number))[0]
    return bits >> 16


def scale_item(scale_dtype: Any) -> Any:
    """The integer that holds a scale."""
    return _I16 if scale_dtype in (types.uint16, types.int16) else _I8


def scale_numbers(builder: Any, scale_dtype: Any, raw: Any) -> Any:
    """A vector of scales as float32. ``raw``: their bits."""
    count = raw.type.count
    wide, numbers = ir.VectorType(I32, count), ir.VectorType(F32, count)
    if scale_dtype == types.uint16:
        return builder.bitcast(builder.shl(builder.zext(raw, wide), all_lanes(wide, 16)), numbers)
    if scale_dtype == types.int16 and "avx512f" in cpu_isa.features():
        return builder.fpext(builder.bitcast(raw, ir.VectorType(ir.HalfType(), count)), numbers)
    if scale_dtype == types.uint8:
        moved, least = builder.shl(builder.zext(raw, wide), all_lanes(wide, 23)), all_lanes(wide, 1 << 22)
        smallest = builder.icmp_unsigned("<", moved, least)  # bits of 0 are 2^-127
        return builder.bitcast(builder.select(smallest, least, moved), numbers)
    shift, kept, factor = (
        (13, 0x8FFFE000, 2.0**112) if scale_dtype == types.int16 else (20, 0x87F00000, 2.0**120)
    )
    moved = builder.shl(builder.sext(raw, wide), all_lanes(wide, shift))
    small = builder.bitcast(builder.and_(moved, all_lanes(wide, kept)), numbers)
    return builder.fmul(small, all_lanes(numbers, factor))


def pointer(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, _I8.as_pointer())


def plus(builder: Any, *values: Any) -> Any:
    """The sum of those values that are not None."""
    first, *others = values
    for value in others:
        first = first if value is None else builder.add(first, value)
    return first


@njit(cache=True, inline="always")
def weight_rows(codes_NK, scales_NG, first, gap, step, count):
    """``count`` pairs of rows: ``first`` and ``first + gap``, then ``step`` further and so on."""
    codes, scales = codes_NK.strides[0], scales_NG.strides[0]
    return (
        codes_NK.ctypes.data + first * codes,
        gap * codes,
        step * codes,
        scales_NG.ctypes.data + first * scales,
        gap * scales,
        step * scales,
        count,
        codes_NK.shape[1],
        scales_NG.shape[1],
    )


@inner()
def dots(num_rows, rows, scales, weights, out):
    """out[w, r, i] float32 [2, 6, 32] = the products of up to 32 pairs of weight rows
    (``weight_rows``) with 1 to 6 rows of x. ``rows`` [6]: addresses, repeated past the last row.
    """
    stay_apart()
    if num_rows == 1:
        _tile(1, rows, scales, weights, out)
    elif num_rows == 2:
        _tile(2, rows, scales, weights, out)
    elif num_rows <= 4:
        _tile(4, rows, scales, weights, out)
    else:
        _tile(6, rows, scales, weights, out)
