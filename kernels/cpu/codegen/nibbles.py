"""Products of rows with weights in 4 bits: of bf16 rows with codes decoded in registers, and of
float32 rows with weights decoded before.

A vector of 64 bytes holds 128 codes of one weight row. Shifted by 4 n bits, its 16-bit lanes look
up values 4 w + n for 32 w in a table of bf16: the rows of x are arranged in the same order
(``arranged``), and two neighbouring lanes are a unit of a product. A unit's sum belongs to 8
neighbouring values, so 4 or 2 of the 16 sums share a scale, which is applied once per vector. This
takes AVX512-BF16.

Scales tell their kind by the dtype of their array: bf16 as uint16, fp16 as int16, E8M0 as uint8,
E4M3 as int8. E8M0 and E4M3 go with E2M1 codes, the others with int4.

Elsewhere a group's 16 numbers are multiplied by its scale and looked up in registers, then kept in
memory for all rows of x; a CPU without AVX2 computes them one by one.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit
from numba.core import cgutils, types
from numba.core.errors import TypingError
from numba.extending import intrinsic, overload

from ... import cpu_isa
from ...formats.four_bit_format import INT4, MXFP4
from .arrays import inner, stay_apart
from .vectors import (
    F32,
    I32,
    LANES,
    SUMS,
    UNITS,
    Rows,
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
_NUM_FIELDS = 9  # of ``weight_rows``
_SCALES = {types.uint16: 4, types.int16: 4, types.uint8: 4, types.int8: 8}  # per vector of codes
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
    if not isinstance(num_rows, types.IntegerLiteral) or scales.dtype not in _SCALES:
        raise TypingError("takes a literal number of rows, and scales of a known kind")
    signature = types.void(num_rows, rows, scales, types.UniTuple(types.intp, _NUM_FIELDS), out)

    def generate(context, builder, signature, arguments):
        _, rows_value, _, fields, out_value = arguments
        place = context.make_array(signature.args[1])(context, builder, rows_value).data
        sums = context.make_array(signature.args[4])(context, builder, out_value).data
        tile = _Tile(builder, num_rows.literal_value, scales.dtype)
        tile.generate(place, cgutils.unpack_tuple(builder, fields, _NUM_FIELDS), sums)
        return context.get_dummy_value()

    return signature, generate


class _Tile:
    """Writes the instructions of pairs of weight rows by ``num_rows`` rows."""

    def __init__(self, builder: Any, num_rows: int, scale_dtype: Any) -> None:
        self._builder, self._num_rows, self._dtype = builder, num_rows, scale_dtype
        kind = ir.FunctionType(_CODES, (_CODES, _CODES))
        self._look_up = builder.module.declare_intrinsic("llvm.x86.avx512.permvar.hi.512", (), kind)
        numbers = (MXFP4 if scale_dtype in _E2M1 else INT4).numbers
        bits = [struct.unpack("<I", struct.pack("<f", number))[0] >> 16 for number in numbers]
        # Twice: a look-up reads five bits, the fifth of which is the next code's.
        self._table = ir.Constant(_CODES, bits * 2)

    def generate(self, rows: Any, fields: list[Any], out: Any) -> None:
        builder = self._builder
        codes, codes_gap, codes_step, scales, scales_gap, scales_step, count, num_bytes, groups = fields
        places = [builder.gep(rows, [_I64(r)], source_etype=_I64) for r in range(self._num_rows)]
        x = [_pointer(builder, builder.load(place, typ=_I64)) for place in places]
        full, rest = builder.lshr(num_bytes, _I64(6)), builder.and_(num_bytes, _I64(63))
        masks = self._masks(rest, builder.sub(groups, builder.mul(full, _I64(_SCALES[self._dtype]))))
        totals = [[cgutils.alloca_once(builder, SUMS) for _ in x] for _ in range(2)]
        with cgutils.for_range(builder, count) as row:
            begun_codes, begun_scales = (
                [
                    _pointer(builder, _plus(builder, base, builder.mul(row.index, step), gap if w else None))
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
        for count, lanes in ((num_bytes, 64), (num_scales, _SCALES[self._dtype])):
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
        builder, count = self._builder, _SCALES[self._dtype]
        item = _I16 if self._dtype in (types.uint16, types.int16) else _I8
        wide, numbers = ir.VectorType(I32, count), ir.VectorType(F32, count)
        offset = builder.mul(index, _I64(count * item.width // 8))
        raw = self._load(row, offset, ir.VectorType(item, count), mask)
        if self._dtype == types.uint16:
            values = builder.bitcast(builder.shl(builder.zext(raw, wide), all_lanes(wide, 16)), numbers)
        elif self._dtype == types.int16:
            values = builder.fpext(builder.bitcast(raw, ir.VectorType(ir.HalfType(), count)), numbers)
        elif self._dtype == types.uint8:
            moved, least = builder.shl(builder.zext(raw, wide), all_lanes(wide, 23)), all_lanes(wide, 1 << 22)
            smallest = builder.icmp_unsigned("<", moved, least)  # bits of 0 are 2^-127
            values = builder.bitcast(builder.select(smallest, least, moved), numbers)
        else:
            moved = builder.shl(builder.sext(raw, wide), all_lanes(wide, 20))
            small = builder.bitcast(builder.and_(moved, all_lanes(wide, 0x87F00000)), numbers)
            values = builder.fmul(small, all_lanes(numbers, 2.0**120))
        lanes = [lane * count // LANES for lane in range(LANES)]
        return builder.shuffle_vector(values, values, ir.Constant(UNITS, lanes))


@_intrinsic
def _group(typing_context, codes, scales, group, scale, factor, numbers):
    """Decodes the bytes of one whole group of a weight row: numbers[k] of the low four bits of byte
    k, numbers[len(codes) + k] of the high ones. Nothing is checked.
    """
    signature = types.void(codes, scales, types.intp, types.float32, types.float32, numbers)

    def generate(context, builder, signature, arguments):
        codes_value, _, group, scale, factor, numbers_value = arguments
        row = context.make_array(signature.args[0])(context, builder, codes_value)
        target = context.make_array(signature.args[5])(context, builder, numbers_value).data
        num_bytes = cgutils.unpack_tuple(builder, row.shape)[0]
        size = AT_ONCE // 2 // _SCALES[scales.dtype]
        table = _Table(builder, scales.dtype, size, scale, factor)
        for part in range(0, size, table.lanes):
            first = builder.add(builder.mul(group, _I64(size)), _I64(part))
            place = builder.gep(row.data, [first], source_etype=_I8)
            raw = ir.VectorType(_I8, table.lanes)
            loaded = builder.load(builder.bitcast(place, raw.as_pointer()), typ=raw, align=1)
            low = builder.zext(loaded, table.codes)
            high = builder.lshr(low, all_lanes(table.codes, 4))
            for code, index in ((low, first), (high, builder.add(first, num_bytes))):
                place = builder.gep(target, [index], source_etype=F32)
                place = builder.bitcast(place, table.numbers.as_pointer())
                builder.store(table.look_up(code), place, align=4)
        return context.get_dummy_value()

    return signature, generate


class _Table:
    """The 16 numbers of a group, in one register of AVX-512 or two of AVX2: ``look_up`` takes as
    many codes at once as there are ``lanes``.
    """

    def __init__(self, builder: Any, scale_dtype: Any, size: int, scale: Any, factor: Any) -> None:
        self.lanes = min(size, LANES if "avx512f" in cpu_isa.features() else 8)
        self.numbers, self.codes = ir.VectorType(F32, self.lanes), ir.VectorType(I32, self.lanes)
        self._builder = builder
        numbers = (MXFP4 if scale_dtype in _E2M1 else INT4).numbers
        factors = [spread(builder, value, self.lanes) for value in (scale, factor)]
        self._parts = []
        for first in range(0, len(numbers), self.lanes):
            part = ir.Constant(self.numbers, list(numbers[first : first + self.lanes]))
            self._parts.append(builder.fmul(builder.fmul(part, factors[0]), factors[1]))
        name = "llvm.x86.avx512.permvar.sf.512" if self.lanes == LANES else "llvm.x86.avx2.permps"
        kind = ir.FunctionType(self.numbers, (self.numbers, self.codes))
        self._permute = builder.module.declare_intrinsic(name, (), kind)

    def look_up(self, codes: Any) -> Any:
        """The numbers of codes, of which the lowest four bits are read."""
        builder = self._builder
        found = [builder.call(self._permute, [part, codes]) for part in self._parts]
        if len(found) == 1:
            return found[0]
        top = builder.shl(codes, all_lanes(self.codes, 28))
        return builder.select(builder.icmp_signed("<", top, all_lanes(self.codes, 0)), found[1], found[0])


@_intrinsic(prefer_literal=True)
def _float_tile(typing_context, num_rows, rows, weights, num_vectors, out):
    """out[w, r] = weight row w (of two) times row r, for ``num_vectors`` of 16 float32. ``rows``:
    addresses. ``weights`` float32 [2, K]. Nothing is checked.
    """
    signature = types.void(num_rows, rows, weights, types.intp, out)

    def generate(context, builder, signature, arguments):
        _, rows_value, weights_value, count, out_value = arguments
        address = context.make_array(signature.args[1])(context, builder, rows_value).data
        sums = context.make_array(signature.args[4])(context, builder, out_value).data
        float_rows = Rows(context, builder, weights, weights_value)
        places = [builder.gep(address, [_I64(r)], source_etype=_I64) for r in range(num_rows.literal_value)]
        x = [_pointer(builder, builder.load(each, typ=_I64)) for each in places]
        turns = 1 if "avx512f" in cpu_isa.features() else -(-len(x) // 3)  # AVX2: 12 sums, 4 weights
        at_once = -(-len(x) // turns)
        for first in range(0, len(x), at_once):
            totals = _float_totals(builder, x[first : first + at_once], float_rows, count)
            for w, row in enumerate(totals):
                for r, value in enumerate(row):
                    target = builder.gep(sums, [_I64(w * ROWS + first + r)], source_etype=F32)
                    builder.store(value, target)
        return context.get_dummy_value()

    return signature, generate


def _float_totals(builder: Any, x: list[Any], weights: Rows, count: Any) -> list[list[Any]]:
    """The products of two weight rows with some rows of x."""
    totals = [[cgutils.alloca_once(builder, SUMS) for _ in x] for _ in range(2)]
    for row in totals:
        for total_place in row:
            builder.store(all_lanes(SUMS, 0.0), total_place)
    with cgutils.for_range(builder, count) as loop:
        column = builder.mul(loop.index, _I64(LANES))
        factors = [weights.load(_I64(w), column) for w in range(2)]
        for r, row in enumerate(x):
            place = builder.gep(row, [builder.mul(column, _I64(4))], source_etype=_I8)
            values = builder.load(builder.bitcast(place, SUMS.as_pointer()), typ=SUMS, align=4)
            for w, factor in enumerate(factors):
                before = builder.load(totals[w][r], typ=SUMS)
                builder.store(multiply_add(builder, before, values, factor), totals[w][r])
    return [[total(builder, builder.load(place, typ=SUMS)) for place in row] for row in totals]


def _pointer(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, _I8.as_pointer())


def _plus(builder: Any, *values: Any) -> Any:
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


@inner()
def float_dots(num_rows, rows, weights, num_vectors, out):
    """out[w, r] float32 [2, 6] = the products of two weight rows, float32 [2, K], with 1 to 6 rows
    of x, for ``num_vectors`` of 16 values. ``rows`` [6]: addresses, repeated past the last row.
    """
    stay_apart()
    if num_rows == 1:
        _float_tile(1, rows, weights, num_vectors, out)
    elif num_rows == 2:
        _float_tile(2, rows, weights, num_vectors, out)
    elif num_rows == 3:
        _float_tile(3, rows, weights, num_vectors, out)
    elif num_rows == 4:
        _float_tile(4, rows, weights, num_vectors, out)
    else:
        _float_tile(6, rows, weights, num_vectors, out)


def decode_row(codes: Any, scales: Any, factor: Any, numbers: Any) -> None:
    """In kernels: a weight row as float32 [K], its even values, then the odd. ``codes`` [K / 2]."""
    raise NotImplementedError


@overload(decode_row)
def _decode_row(codes, scales, factor, numbers):
    size = AT_ONCE // 2 // _SCALES[scales.dtype]

    def scalar(codes, scales, factor, numbers, group):
        half = len(codes)
        first, last = group * size, min((group + 1) * size, half)
        numbers_of(codes[first:last], scales[group], numbers[first:last], numbers[half + first : half + last])
        for k in range(first, last):
            numbers[k] *= factor
            numbers[half + k] *= factor

    rest = njit(inline="always")(scalar)

    def by_group(codes, scales, factor, numbers):
        for group in range(len(scales)):
            rest(codes, scales, factor, numbers, group)

    def by_vector(codes, scales, factor, numbers):
        whole = len(codes) // size
        for group in range(whole):
            _group(codes, scales, group, scale_of(scales[group]), factor, numbers)
        for group in range(whole, len(scales)):
            rest(codes, scales, factor, numbers, group)

    return by_vector if "avx2" in cpu_isa.features() else by_group


def scale_of(scale: Any) -> Any:
    """In kernels: a scale as float32."""
    raise NotImplementedError


def numbers_of(codes: Any, scale: Any, low: Any, high: Any) -> Any:
    """In kernels: the float32 values of a group's bytes: those of the low bits and of the high."""
    raise NotImplementedError


@overload(scale_of, inline="always")
def _scale_of(scale):
    if scale == types.uint16:
        return lambda scale: np.uint32(np.uint32(scale) << np.uint32(16)).view(np.float32)
    if scale == types.uint8:
        return lambda scale: np.uint32(max(np.uint32(scale) << np.uint32(23), np.uint32(1 << 22))).view(
            np.float32
        )
    if scale == types.int8:

        def from_e4m3(scale):
            moved = np.uint32(np.int32(scale) << np.int32(20)) & np.uint32(0x87F00000)
            return np.uint32(moved).view(np.float32) * np.float32(2.0**120)

        return from_e4m3

    def from_fp16(scale):
        size = np.uint32(np.uint32(np.int32(scale) & np.int32(0x7FFF)) << np.uint32(13)).view(np.float32)
        return size * np.float32(2.0**112) * (np.float32(-1) if scale < 0 else np.float32(1))

    return from_fp16


@overload(numbers_of)
def _numbers_of(codes, scale, low, high):
    if scale in _E2M1:

        def from_e2m1(codes, scale, low, high):
            factor = scale_of(scale)
            for i in range(len(codes)):
                code = np.uint32(codes[i])
                low[i] = _from_e2m1(code) * factor
                high[i] = _from_e2m1(code >> np.uint32(4)) * factor

        return from_e2m1

    def from_int4(codes, scale, low, high):
        factor = scale_of(scale)
        for i in range(len(codes)):
            code = np.int32(codes[i])
            low[i] = np.float32((code & np.int32(15)) - np.int32(8)) * factor
            high[i] = np.float32((code >> np.int32(4)) - np.int32(8)) * factor

    return from_int4


@njit(cache=True, inline="always")
def _from_e2m1(code):
    """The low four bits: sign, two bits of exponent, one of mantissa."""
    moved = ((code & np.uint32(7)) << np.uint32(22)) | ((code & np.uint32(8)) << np.uint32(28))
    return np.uint32(moved).view(np.float32) * np.float32(2.0**126)
