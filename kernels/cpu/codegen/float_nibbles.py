"""Products of float32 rows with weights in 4 bits, for CPUs without AVX512-BF16 and for float32.

A vector of 64 bytes holds 128 codes of one weight row: byte b has values 2 b and 2 b + 1. Its low
and its high four bits look up the upper and the lower byte of a number in bf16; the bytes, put side
by side within each 128 bits, are pairs of bf16, of which a shift and a mask make float32. That is 8
vectors of 16 values, in an order in which rows of x lie too (``arranged_floats``). Each is
multiplied by its group's scale, exactly, then by x and added to the 16 sums of the weight row.

Rows are multiplied as codes are decoded (``decoded_dots``). With AVX2, 17 rows and more are faster
with a weight row decoded into memory once (``decode_row``, ``float_dots``). Both add the same
products in the same order, and AVX2 does in two halves what AVX-512 does at once, so all give the
same bits. A CPU without AVX2 decodes into memory one value after the other.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit
from numba.core import cgutils, types
from numba.core.errors import TypingError
from numba.extending import intrinsic, overload

from ... import cpu_isa
from .arrays import inner, stay_apart
from .nibbles import (
    AT_ONCE,
    BLOCK,
    NUM_FIELDS,
    ROWS,
    SCALES,
    bf16_bits,
    code_numbers,
    plus,
    pointer,
    scale_item,
    scale_numbers,
)
from .vectors import F32, I32, LANES, SUMS, Rows, all_lanes, multiply_add, total

_AHEAD = 4096  # bytes from codes that are read to those that are fetched

_I8, _I16, _I64 = ir.IntType(8), ir.IntType(16), ir.IntType(64)
_E2M1 = (types.uint8, types.int8)

_intrinsic: Any = intrinsic  # typed as the definition, which also takes the compiler's context


@njit(cache=True, inline="always")
def arranged_floats(k):
    """The place of value k of a row of x."""
    vector = k % 2 * 4 + k // 16 % 2 * 2 + k // 2 % 2
    return k // AT_ONCE * AT_ONCE + vector * LANES + k // 32 % 4 * 4 + k // 4 % 4


class _Decoder:
    """Writes the instructions that decode vectors of codes of some weight rows: at once 64 bytes
    with AVX-512, 32 with AVX2. ``rows``: the addresses of each one's codes and scales.
    ``alternates``: weight rows and halves take turns with four vectors of values each, so that few
    sums, each of which waits for its last product, are added to at once. It takes registers.
    """

    def __init__(
        self, builder: Any, scale_dtype: Any, rows: list[tuple[Any, Any]], groups: Any, alternates: bool
    ) -> None:
        if scale_dtype not in SCALES:
            raise TypingError("takes scales of a known kind")
        self._builder, self._dtype, self._rows, self._groups = builder, scale_dtype, rows, groups
        wide = "avx512bw" in cpu_isa.features()
        self.lanes = LANES if wide else LANES // 2
        self._alternates = alternates and not wide and SCALES[scale_dtype] == 4
        self._bytes = ir.VectorType(_I8, 4 * self.lanes)
        self._units, self.numbers = ir.VectorType(I32, self.lanes), ir.VectorType(F32, self.lanes)
        name = "llvm.x86.avx512.pshuf.b.512" if wide else "llvm.x86.avx2.pshuf.b"
        kind = ir.FunctionType(self._bytes, (self._bytes, self._bytes))
        self._look_up = builder.module.declare_intrinsic(name, (), kind)
        bits = [bf16_bits(number) for number in code_numbers(scale_dtype)]
        self._tables = [
            ir.Constant(self._bytes, [each >> shift & 255 for each in bits] * (self.lanes // 4))
            for shift in (0, 8)
        ]

    def step(self, index: Any, rest: Any, take: Callable[[int, int, int, Any], None]) -> None:
        """Calls ``take(w, part, vector, values)`` for the values of vector ``index`` of codes of
        weight row w: those of part 0 of 1, or 0 and 1. ``rest``: bytes that there are, None if all.
        """
        parts = range(LANES // self.lanes)
        sections = [(part, w) for part in parts for w in range(len(self._rows))]
        held = {}
        if rest is None:
            for codes, _ in self._rows:
                self._fetch(codes, index)
        turns = ((0,), (4,)) if self._alternates else ((0, 4),)
        for shifts in turns:
            for part, w in sections:
                codes, scales = self._rows[w]
                if (part, w) not in held:
                    held[part, w] = self._factors(scales, index, part, rest is not None)
                loaded = self._load(codes, index, part, rest)
                for shift in shifts:
                    for number, values in enumerate(self._decoded(loaded, shift, held[part, w])):
                        take(w, part, shift + number, values)
                self._keep_apart()

    def _fetch(self, codes: Any, index: Any) -> None:
        """Fetches codes that come soon, mostly of further rows, into the L2 cache."""
        builder = self._builder
        place = builder.gep(
            codes, [builder.add(builder.mul(index, _I64(64)), _I64(_AHEAD))], source_etype=_I8
        )
        kind = ir.FunctionType(ir.VoidType(), (_I8.as_pointer(), I32, I32, I32))
        fetch = builder.module.declare_intrinsic("llvm.prefetch.p0", (), kind)
        builder.call(fetch, [place, I32(0), I32(2), I32(1)])

    def _keep_apart(self) -> None:
        """Keeps loads of what follows behind what went before: the compiler would load values of x
        once for all weight rows, and AVX2 has no registers to keep them in.
        """
        if self.lanes < LANES:
            nothing = ir.FunctionType(ir.VoidType(), ())
            self._builder.asm(nothing, "", "~{memory}", [], True)

    def _decoded(self, loaded: Any, shift: int, factors: list[Any]) -> Any:
        """The 4 vectors of values of the low bits, or of the high ones (``shift`` 4), in order."""
        builder = self._builder
        codes = builder.lshr(loaded, all_lanes(self._bytes, shift)) if shift else loaded
        codes = builder.and_(codes, all_lanes(self._bytes, 15))
        low, high = (builder.call(self._look_up, [table, codes]) for table in self._tables)
        for half, factor in enumerate(factors):
            places = [16 * lane + 8 * half + j for lane in range(self.lanes // 4) for j in range(8)]
            both = [place + other for place in places for other in (0, 4 * self.lanes)]
            kind = ir.VectorType(I32, len(both))
            pairs = builder.shuffle_vector(low, high, ir.Constant(kind, both))
            units = builder.bitcast(pairs, self._units)
            for bits in (
                builder.shl(units, all_lanes(self._units, 16)),
                builder.and_(units, all_lanes(self._units, 0xFFFF0000)),
            ):
                yield builder.fmul(builder.bitcast(bits, self.numbers), factor)

    def _load(self, codes: Any, index: Any, part: int, rest: Any) -> Any:
        """A vector of codes, 0 where there are none."""
        builder, first = self._builder, 4 * self.lanes * part
        offset = builder.add(builder.mul(index, _I64(64)), _I64(first))
        place = builder.gep(codes, [offset], source_etype=_I8)
        if rest is None:
            return builder.load(builder.bitcast(place, self._bytes.as_pointer()), typ=self._bytes, align=1)
        # Words of four bytes, which rows consist of: AVX2 has no mask of bytes.
        words = ir.VectorType(I32, self.lanes)
        left = builder.ashr(builder.sub(builder.trunc(rest, I32), I32(first)), I32(2))
        nothing = ir.Constant(words, ir.Undefined)
        left = builder.insert_element(nothing, left, I32(0))
        left = builder.shuffle_vector(left, nothing, all_lanes(words, 0))
        mask = builder.icmp_signed("<", ir.Constant(words, list(range(self.lanes))), left)
        kind = ir.FunctionType(words, (words.as_pointer(), I32, mask.type, words))
        name = f"llvm.masked.load.v{self.lanes}i32.p0"
        load = builder.module.declare_intrinsic(name, (), kind)
        place = builder.bitcast(place, words.as_pointer())
        return builder.bitcast(builder.call(load, [place, I32(1), mask, all_lanes(words, 0)]), self._bytes)

    def _factors(self, row: Any, index: Any, part: int, is_last: bool) -> list[Any]:
        """Scales of the vectors from the first 8 bytes of each 16, and of the other vectors."""
        builder, whole = self._builder, SCALES[self._dtype]
        count, item = whole * self.lanes // LANES, scale_item(self._dtype)
        first = builder.add(builder.mul(index, _I64(whole)), _I64(part * count))
        raw = ir.VectorType(item, count)
        if is_last:  # past the last scale, for zeros of x: the last one
            last, loaded = builder.sub(self._groups, _I64(1)), ir.Constant(raw, ir.Undefined)
            for i in range(count):
                place = builder.add(first, _I64(i))
                place = builder.select(builder.icmp_signed("<", place, last), place, last)
                scale = builder.load(builder.gep(row, [place], source_etype=item), typ=item, align=1)
                loaded = builder.insert_element(loaded, scale, I32(i))
        else:
            place = builder.gep(row, [first], source_etype=item)
            loaded = builder.load(builder.bitcast(place, raw.as_pointer()), typ=raw, align=1)
        values, found = scale_numbers(builder, self._dtype, loaded), []
        per_lane = count * 4 // self.lanes  # of 128 bits: 1, or 2
        for half in range(per_lane):
            lanes = [lane // 4 * per_lane + half for lane in range(self.lanes)]
            found.append(builder.shuffle_vector(values, values, ir.Constant(self._units, lanes)))
        return found if per_lane == 2 else found * 2


def _steps(builder: Any, num_bytes: Any, step: Callable[[Any, Any], None]) -> None:
    """Calls ``step(index, rest)`` within a loop over whole vectors of codes, and for the rest."""
    full, rest = builder.lshr(num_bytes, _I64(6)), builder.and_(num_bytes, _I64(63))
    with cgutils.for_range(builder, full) as loop:
        step(loop.index, None)
    with cgutils.if_unlikely(builder, builder.icmp_signed(">", rest, _I64(0))):
        step(full, rest)


@_intrinsic(prefer_literal=True)
def _decoded_tile(typing_context, num_rows, rows, scales, weights, out):
    """out[w, r, i] = weight row i of run w (of two) times row r. ``rows``: addresses. ``scales``:
    any array of the dtype. ``weights``: what ``weight_rows`` returns. Nothing is checked.
    """
    signature = types.void(num_rows, rows, scales, types.UniTuple(types.intp, NUM_FIELDS), out)

    def generate(context, builder, signature, arguments):
        if num_rows.literal_value > _most_rows():  # nobody calls it
            return context.get_dummy_value()
        _, rows_value, _, fields, out_value = arguments
        address = context.make_array(signature.args[1])(context, builder, rows_value).data
        sums = context.make_array(signature.args[4])(context, builder, out_value).data
        places = [builder.gep(address, [_I64(r)], source_etype=_I64) for r in range(num_rows.literal_value)]
        x = [pointer(builder, builder.load(place, typ=_I64)) for place in places]
        _products(builder, scales.dtype, x, cgutils.unpack_tuple(builder, fields, NUM_FIELDS), sums)
        return context.get_dummy_value()

    return signature, generate


def _products(builder: Any, scale_dtype: Any, x: list[Any], fields: list[Any], out: Any) -> None:
    codes, codes_gap, codes_step, scales, scales_gap, scales_step, count, num_bytes, groups = fields
    # AVX2 has 16 registers: 8 sums, of two halves each.
    at_once = 2 if "avx512bw" in cpu_isa.features() or len(x) <= 2 else 1
    with cgutils.for_range(builder, count) as row:
        begun = [
            tuple(
                pointer(builder, plus(builder, base, builder.mul(row.index, step), gap if w else None))
                for base, gap, step in ((codes, codes_gap, codes_step), (scales, scales_gap, scales_step))
            )
            for w in range(2)
        ]
        for first in range(0, 2, at_once):
            decoder = _Decoder(builder, scale_dtype, begun[first : first + at_once], groups, len(x) == 1)
            found = _summed(builder, decoder, x, at_once, num_bytes)
            for w, values in enumerate(found):
                for r, value in enumerate(values):
                    place = builder.add(row.index, _I64(((first + w) * ROWS + r) * BLOCK))
                    builder.store(value, builder.gep(out, [place], source_etype=F32))


def _summed(builder: Any, decoder: _Decoder, x: list[Any], num_weights: int, num_bytes: Any) -> Any:
    """The products of the decoder's weight rows with rows of x."""
    parts = range(LANES // decoder.lanes)
    totals = [
        [[cgutils.alloca_once(builder, decoder.numbers) for _ in parts] for _ in x]
        for _ in range(num_weights)
    ]
    for place in (place for row in totals for pair in row for place in pair):
        builder.store(all_lanes(decoder.numbers, 0.0), place)

    def step(index, rest):
        def take(w, part, number, values):
            offset = builder.mul(index, _I64(4 * AT_ONCE))
            offset = builder.add(offset, _I64(64 * number + 4 * decoder.lanes * part))
            for r, row in enumerate(x):
                place = builder.gep(row, [offset], source_etype=_I8)
                place = builder.bitcast(place, decoder.numbers.as_pointer())
                given = builder.load(place, typ=decoder.numbers, align=4)
                before = builder.load(totals[w][r][part], typ=decoder.numbers)
                builder.store(multiply_add(builder, before, given, values), totals[w][r][part])

        decoder.step(index, rest, take)

    _steps(builder, num_bytes, step)
    return [[total(builder, _joined(builder, places)) for places in row] for row in totals]


def _joined(builder: Any, places: list[Any]) -> Any:
    """16 sums from one vector or two."""
    loaded = [builder.load(place, typ=place.type.pointee) for place in places]
    if len(loaded) == 1:
        return loaded[0]
    return builder.shuffle_vector(*loaded, ir.Constant(ir.VectorType(I32, LANES), list(range(LANES))))


@_intrinsic
def _decode(typing_context, codes, scales, numbers):
    """Decodes a weight row in the order of ``arranged_floats``. Nothing is checked."""
    signature = types.void(codes, scales, numbers)

    def generate(context, builder, signature, arguments):
        arrays = [
            context.make_array(kind)(context, builder, value)
            for kind, value in zip(signature.args, arguments, strict=True)
        ]
        num_bytes, groups = (cgutils.unpack_tuple(builder, each.shape)[0] for each in arrays[:2])
        places = tuple(builder.bitcast(each.data, _I8.as_pointer()) for each in arrays)
        decoder = _Decoder(builder, scales.dtype, [places[:2]], groups, False)

        def step(index, rest):
            def take(w, part, number, values):
                offset = builder.mul(index, _I64(4 * AT_ONCE))
                offset = builder.add(offset, _I64(64 * number + 4 * decoder.lanes * part))
                place = builder.gep(places[2], [offset], source_etype=_I8)
                builder.store(values, builder.bitcast(place, decoder.numbers.as_pointer()), align=4)

            decoder.step(index, rest, take)

        _steps(builder, num_bytes, step)
        return context.get_dummy_value()

    return signature, generate


@_intrinsic(prefer_literal=True)
def _float_tile(typing_context, num_rows, rows, weights, num_vectors, out):
    """out[w, r, 0] = weight row w (of two) times row r, for ``num_vectors`` of 16 float32.
    ``rows``: addresses. ``weights`` float32 [2, K]. Nothing is checked.
    """
    signature = types.void(num_rows, rows, weights, types.intp, out)

    def generate(context, builder, signature, arguments):
        _, rows_value, weights_value, count, out_value = arguments
        address = context.make_array(signature.args[1])(context, builder, rows_value).data
        sums = context.make_array(signature.args[4])(context, builder, out_value).data
        float_rows = Rows(context, builder, weights, weights_value)
        places = [builder.gep(address, [_I64(r)], source_etype=_I64) for r in range(num_rows.literal_value)]
        x = [pointer(builder, builder.load(each, typ=_I64)) for each in places]
        turns = 1 if "avx512f" in cpu_isa.features() else -(-len(x) // 3)  # AVX2: 12 sums, 4 weights
        at_once = -(-len(x) // turns)
        for first in range(0, len(x), at_once):
            for w, row in enumerate(_float_totals(builder, x[first : first + at_once], float_rows, count)):
                for r, value in enumerate(row):
                    place = _I64((w * ROWS + first + r) * BLOCK)
                    builder.store(value, builder.gep(sums, [place], source_etype=F32))
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


@inner()
def decoded_dots(num_rows, rows, scales, weights, out):
    """out[w, r, i] float32 [2, 6, 32] = the products of up to 32 pairs of weight rows
    (``nibbles.weight_rows``), of a multiple of 8 codes each, with as many rows of x as
    ``rows_at_once`` allows. ``rows`` [6]: addresses, repeated past the last row.
    """
    stay_apart()
    if num_rows == 1:
        _decoded_tile(1, rows, scales, weights, out)
    elif num_rows == 2:
        _decoded_tile(2, rows, scales, weights, out)
    elif num_rows == 3:
        _decoded_tile(3, rows, scales, weights, out)
    elif num_rows == 4:
        _decoded_tile(4, rows, scales, weights, out)
    else:
        _decoded_tile(6, rows, scales, weights, out)


@inner()
def float_dots(num_rows, rows, weights, num_vectors, out):
    """out[w, r, 0], of float32 [2, 6, 32] = the products of two weight rows, float32 [2, K], with 1
    to 6 rows of x, for ``num_vectors`` of 16 values. ``rows`` [6]: addresses, repeated past the
    last row.
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


def rows_at_once(num_rows: Any) -> Any:
    """In kernels: how many rows ``decoded_dots`` takes at most. 0: ``float_dots`` multiplies
    ``num_rows`` rows in less time.
    """
    raise NotImplementedError


@overload(rows_at_once, inline="always")
def _rows_at_once(num_rows):
    most = _most_rows()
    if most == ROWS:
        return lambda num_rows: ROWS
    few = 4 * most
    return lambda num_rows: most if num_rows <= few else 0


def _most_rows() -> int:
    """AVX-512 keeps 12 sums in 32 registers. AVX2 keeps 8 in 16, since decoding takes the others:
    with 6 rows a row took 1.5 times as long as with 4 (EPYC Genoa).
    """
    features = cpu_isa.features()
    return ROWS if "avx512bw" in features else 4 if "avx2" in features else 0


def decode_row(codes: Any, scales: Any, numbers: Any) -> None:
    """In kernels: a weight row as float32 in the order of ``arranged_floats``. ``codes`` uint8
    [K / 2]; ``numbers`` [K up to a multiple of 128], of which those past K come to nothing.
    """
    raise NotImplementedError


@overload(decode_row)
def _decode_row(codes, scales, numbers):
    if _most_rows() > 0:
        return lambda codes, scales, numbers: _decode(codes, scales, numbers)
    size = AT_ONCE // 2 // SCALES[scales.dtype]

    def by_group(codes, scales, numbers):
        low, high = np.empty(size, np.float32), np.empty(size, np.float32)
        for group in range(len(scales)):
            first, last = group * size, min((group + 1) * size, len(codes))
            numbers_of(codes[first:last], scales[group], low, high)
            for k in range(first, last):
                numbers[arranged_floats(2 * k)] = low[k - first]
                numbers[arranged_floats(2 * k + 1)] = high[k - first]

    return by_group


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
