"""Loops of compiled kernels on the threads of torch's OpenMP, whose bodies are compiled once.

Numba compiles the body of ``prange`` four times over, in the function of the loop and in each of
three around it, which was a third of what it took to compile the kernels of a model. Here there is
one such loop, and it calls bodies by their address.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, prange
from numba.core import cgutils, types
from numba.extending import intrinsic

_intrinsic: Any = intrinsic  # its type is that of the definition, which takes the compiler's context, too

_INDEX = ir.IntType(64)  # types.intp
_PARTS = 64  # at most: the loop shares them evenly among threads, whose number kernels that are kept on disk cannot ask for
_PART = (types.intp, types.intp, types.intp)  # begin, end, and the address of what the body is given


@_intrinsic
def share_out(typing_context, body, count, arguments, alone):
    """In kernels: body(begin, end, *arguments) for parts that make up [0, count), on all threads,
    or all of it on this one if ``alone``.

    ``arguments`` is a tuple; what they refer to stays the caller's.
    """
    given = tuple(types.unliteral(kind) for kind in arguments.types)
    body_signature = body.get_call_type(typing_context, (types.intp, types.intp, *given), {})
    loop = types.Dispatcher(_loop)
    loop_signature = loop.get_call_type(
        typing_context, (types.intp, types.intp, types.intp, types.boolean), {}
    )

    def generate(context, builder, signature, values):
        _, count, arguments, alone = values
        run_body, run_loop = (
            context.get_function(body, body_signature),
            context.get_function(loop, loop_signature),
        )
        packer = context.get_arg_packer(given)
        leaves = packer.as_arguments(builder, cgutils.unpack_tuple(builder, arguments, len(given)))
        room = cgutils.alloca_once(builder, ir.LiteralStructType([leaf.type for leaf in leaves]))
        for i, leaf in enumerate(leaves):
            builder.store(leaf, cgutils.gep_inbounds(builder, room, 0, i))
        part = _part(context, builder.module, run_body, given, room.type)
        run_loop(builder, (builder.ptrtoint(part, _INDEX), builder.ptrtoint(room, _INDEX), count, alone))
        return context.get_dummy_value()

    return types.void(body, types.intp, arguments, types.boolean), generate


def _part(context: Any, module: Any, run_body: Any, given: tuple[Any, ...], room_type: Any) -> Any:
    """The function that calls the body, in numba's convention for calls; by itself, so that the
    body is there only once.
    """
    kind = context.call_conv.get_function_type(types.none, _PART)
    function = ir.Function(module, kind, module.get_unique_name("part"))
    function.linkage = "internal"
    function.attributes.add("noinline")
    builder = ir.IRBuilder(function.append_basic_block())
    begin, end, address = context.call_conv.get_arguments(function)
    room = builder.inttoptr(address, room_type)
    leaves = [
        builder.load(cgutils.gep_inbounds(builder, room, 0, i))
        for i in range(len(room_type.pointee.elements))
    ]
    values = context.get_arg_packer(given).from_arguments(builder, leaves)
    run_body(
        builder,
        (begin, end, *(_borrowed(context, builder, *pair) for pair in zip(given, values, strict=True))),
    )
    context.call_conv.return_value(builder, context.get_dummy_value())
    return function


def _borrowed(context: Any, builder: Any, kind: Any, value: Any) -> Any:
    """The same without owners of arrays, whose references nobody need count then: threads would
    take turns at every row.
    """
    if isinstance(kind, types.BaseTuple):
        kinds = kind.types  # type: ignore[attr-defined]
        items = zip(kinds, cgutils.unpack_tuple(builder, value, len(kinds)), strict=True)
        return context.make_tuple(builder, kind, [_borrowed(context, builder, *item) for item in items])
    if not isinstance(kind, types.Array):
        return value
    array = context.make_array(kind)(context, builder, value)
    array.meminfo = array.parent = cgutils.get_null_value(array.meminfo.type)
    return array._getvalue()


@_intrinsic
def _call(typing_context, function, begin, end, given):
    """Runs a part."""

    def generate(context, builder, signature, values):
        kind = context.call_conv.get_function_type(types.none, _PART)
        function = builder.inttoptr(values[0], kind.as_pointer())
        status, _ = context.call_conv.call_function(builder, function, types.none, _PART, values[1:])
        with cgutils.if_unlikely(builder, status.is_error):
            context.call_conv.return_status_propagate(builder, status)
        return context.get_dummy_value()

    return types.void(types.intp, *_PART), generate


@njit(cache=True, parallel=True)
def _loop(function, given, count, alone):
    if alone:
        _call(function, 0, count, given)
    else:
        num_parts = min(count, _PARTS)
        for number in prange(num_parts):
            part = np.intp(number)
            _call(function, count * part // num_parts, count * (part + 1) // num_parts, given)
