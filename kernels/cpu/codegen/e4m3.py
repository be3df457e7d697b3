"""Decodes cached e4m3 to units of bf16 for products. The tables stay in registers; the caller
applies the scales.

Every e4m3 value is also a bf16 value. Its two bytes are looked up by the seven bits beside the
sign, 64 values at a time, which takes AVX512-VBMI.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import struct
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.errors import TypingError
from numba.extending import intrinsic

from ... import cpu_isa
from .tiles import Places, are_places, transposed
from .vectors import I32, LANES, UNITS, Rows, all_lanes, is_matrix, multiplies_bf16

_intrinsic: Any = intrinsic

AT_ONCE = 64  # values per vector
_BYTES = ir.VectorType(ir.IntType(8), AT_ONCE)


def decodes() -> bool:
    """Whether the processor has AVX512-VBMI and multiplies bf16."""
    return multiplies_bf16() and "avx512vbmi" in cpu_isa.features()


@_intrinsic
def turn_bytes(typing_context, entries, places, first, column, out, out_row, out_column):
    """out[out_row + u, out_column + j] = values ``column`` + 2 u and the next, of position
    ``first`` + j (``tiles.Places``), for 32 u and 16 j.
    """
    _check(entries, places, out)
    signature = types.void(entries, places, types.intp, types.intp, out, types.intp, types.intp)

    def generate(context, builder, signature, arguments):
        _, _, first, column, _, out_row, out_column = arguments
        source, target = (Rows(context, builder, signature.args[i], arguments[i]) for i in (0, 4))
        own = Places(context, builder, places, arguments[1])
        quads = [own.load(source, _plus(builder, first, j), column, AT_ONCE) for j in range(LANES)]
        for i, quad in enumerate(transposed(builder, [builder.bitcast(values, UNITS) for values in quads])):
            low, high = _decoded(builder, builder.bitcast(quad, _BYTES))
            for half in range(2):
                lanes = [4 * (n // 4) + 2 * half + n % 4 // 2 + n % 2 * AT_ONCE for n in range(AT_ONCE)]
                target.store(
                    _shuffled(builder, low, high, lanes), _plus(builder, out_row, 2 * i + half), out_column
                )
        return context.get_dummy_value()

    return signature, generate


@_intrinsic
def pair_bytes(typing_context, entries, places, first, column, out, out_row, out_column):
    """out[out_row, out_column + i] = values ``column`` + i of positions ``first`` and ``first``
    + 1, for 64 i.
    """
    _check(entries, places, out)
    signature = types.void(entries, places, types.intp, types.intp, out, types.intp, types.intp)

    def generate(context, builder, signature, arguments):
        _, _, first, column, _, out_row, out_column = arguments
        source, target = (Rows(context, builder, signature.args[i], arguments[i]) for i in (0, 4))
        own = Places(context, builder, places, arguments[1])
        both = [own.load(source, _plus(builder, first, n), column, AT_ONCE) for n in range(2)]
        for half in range(2):
            # Each quarter of the vector gets the values that its part of two vectors of units will
            # hold.
            values = [32 * half + 4 * (w // 8) + w % 4 + 16 * (w % 8 // 4) for w in range(AT_ONCE // 2)]
            mixed = builder.shuffle_vector(
                *both, _lanes([value + n * AT_ONCE for value in values for n in range(2)])
            )
            low, high = _decoded(builder, mixed)
            for part in range(2):
                lanes = [16 * (n // 16) + 8 * part + n % 16 // 2 + n % 2 * AT_ONCE for n in range(AT_ONCE)]
                target.store(
                    _shuffled(builder, low, high, lanes),
                    out_row,
                    _plus(builder, out_column, 32 * half + 16 * part),
                )
        return context.get_dummy_value()

    return signature, generate


@_intrinsic
def take_scales(typing_context, entries, places, number, out, out_row):
    """out[out_row, n] = number ``number`` of position n, as float32, for all n of ``out``."""
    if not (is_matrix(entries, types.uint8) and are_places(places) and is_matrix(out, types.float32)):
        raise TypingError("take_scales takes bytes, places and a matrix of float32")
    signature = types.void(entries, places, types.intp, out, types.intp)

    def generate(context, builder, signature, arguments):
        _, _, number, _, out_row = arguments
        source = Rows(context, builder, entries, arguments[0], types.float32)
        own, target = (
            Places(context, builder, places, arguments[1]),
            Rows(context, builder, out, arguments[3]),
        )
        with cgutils.for_range(builder, target.num_columns) as loop:
            target.store(own.load(source, loop.index, number, 1), out_row, loop.index)
        return context.get_dummy_value()

    return signature, generate


def _check(entries: Any, places: Any, out: Any) -> None:
    if not (is_matrix(entries, types.uint8) and are_places(places) and is_matrix(out, types.uint32)):
        raise TypingError("takes bytes, places and a matrix of units")


def _decoded(builder: Any, values: Any) -> tuple[Any, Any]:
    """The low and the high bytes of each decoded value."""
    bits = [struct.unpack("<I", struct.pack("<f", _value(size)))[0] >> 16 for size in range(128)]
    low, high = (_looked_up(builder, values, [number >> shift & 0xFF for number in bits]) for shift in (0, 8))
    return low, builder.or_(high, builder.and_(values, all_lanes(_BYTES, 0x80)))


def _value(size: int) -> float:
    """Value of the seven bits beside the sign. All bits set (NaN) gives the same value as
    ``fp8.from_e4m3``.
    """
    exponent, fraction = size >> 3, size & 7
    return (8 + fraction) / 8 * 2.0 ** (exponent - 7) if exponent else fraction / 8 * 2.0**-6


def _looked_up(builder: Any, values: Any, table: list[int]) -> Any:
    kind = ir.FunctionType(_BYTES, (_BYTES, _BYTES, _BYTES))
    function = builder.module.declare_intrinsic("llvm.x86.avx512.vpermi2var.qi.512", (), kind)
    halves = (ir.Constant(_BYTES, table[begin : begin + AT_ONCE]) for begin in (0, AT_ONCE))
    return builder.call(function, [next(halves), values, next(halves)])


def _shuffled(builder: Any, low: Any, high: Any, lanes: list[int]) -> Any:
    return builder.bitcast(builder.shuffle_vector(low, high, _lanes(lanes)), UNITS)


def _lanes(lanes: list[int]) -> Any:
    return ir.Constant(ir.VectorType(I32, len(lanes)), lanes)


def _plus(builder: Any, value: Any, constant: int) -> Any:
    return builder.add(value, ir.Constant(value.type, constant))
