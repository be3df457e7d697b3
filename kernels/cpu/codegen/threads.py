"""Parallel loops of compiled kernels, with bodies compiled once.

Numba compiles the body of a ``prange`` four times, in the loop's function and in each of three
around it: a third of the time to compile a model's kernels. Here a body is called by its address,
on this thread and on those of the crew.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit
from numba.core import cgutils, types
from numba.extending import intrinsic

from . import crew

_intrinsic: Any = intrinsic  # typed as the definition, which also takes the compiler's context

_INDEX = ir.IntType(64)  # types.intp
_NOT_SHARED = -1


@_intrinsic
def share_out(typing_context, body, count, arguments, alone):
    """In kernels: calls body(begin, end, *arguments) for parts that make up [0, count), on all
    threads; or for the whole range on this thread if ``alone``, if there are no helpers, or if they
    share the loop of another thread.

    ``arguments`` is a tuple; the caller keeps ownership of the arrays in it.
    """
    given = tuple(types.unliteral(kind) for kind in arguments.types)
    body_signature = body.get_call_type(typing_context, (types.intp, types.intp, *given), {})

    def generate(context, builder, signature, values):
        _, count, arguments, alone = values
        run_body = context.get_function(body, body_signature)
        packer = context.get_arg_packer(given)
        leaves = packer.as_arguments(builder, cgutils.unpack_tuple(builder, arguments, len(given)))
        room = cgutils.alloca_once(builder, ir.LiteralStructType([leaf.type for leaf in leaves]))
        for i, leaf in enumerate(leaves):
            builder.store(leaf, cgutils.gep_inbounds(builder, room, 0, i))
        part = _part(context, builder.module, run_body, given, room.type)
        _run(context, builder, (part, builder.ptrtoint(room, _INDEX), count), alone)
        return context.get_dummy_value()

    return types.void(body, types.intp, arguments, types.boolean), generate


@_intrinsic
def take_item(typing_context, counter):
    """Atomic counter[0]++: each thread gets another value."""
    signature = types.intp(counter)

    def generate(context, builder, signature, arguments):
        place = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.atomic_rmw("add", place, ir.Constant(_INDEX, 1), "monotonic")

    return signature, generate


@_intrinsic
def borrowed(typing_context, array):
    """In kernels: the same array, of which no references are counted. Each count holds up the loads
    that follow it. The caller keeps the array alive.
    """

    def generate(context, builder, signature, arguments):
        return _borrowed(context, builder, signature.args[0], arguments[0])

    return array(array), generate


def _run(context: Any, builder: Any, loop: tuple[Any, Any, Any], alone: Any) -> None:
    """Calls a loop's parts. ``loop``: their function, the address of their arguments, the count."""
    part, given, count = loop
    state = builder.module.globals.get(crew.SYMBOL) or ir.GlobalVariable(builder.module, _INDEX, crew.SYMBOL)
    shared = cgutils.alloca_once_value(builder, _INDEX(_NOT_SHARED))
    share = builder.load_atomic(state, "acquire", 8, typ=_INDEX)
    helped = builder.icmp_unsigned("!=", share, _INDEX(0))
    several = builder.icmp_signed(">", count, _INDEX(1))
    with builder.if_then(builder.and_(builder.and_(helped, several), builder.not_(alone))):
        function = builder.inttoptr(share, ir.FunctionType(_INDEX, [_INDEX] * 4).as_pointer())
        given_all = (builder.ptrtoint(state, _INDEX), builder.ptrtoint(part, _INDEX), given, count)
        builder.store(builder.call(function, given_all), shared)
    outcome = builder.load(shared)
    with builder.if_then(builder.icmp_signed("==", outcome, _INDEX(_NOT_SHARED))):
        values = (_INDEX(0), count, given)
        status, _ = context.call_conv.call_function(builder, part, types.none, crew.PART, values)
        with cgutils.if_unlikely(builder, status.is_error):
            context.call_conv.return_status_propagate(builder, status)
    with cgutils.if_unlikely(builder, builder.icmp_signed(">", outcome, _INDEX(0))):
        context.call_conv.return_user_exc(builder, RuntimeError, ("a part of a kernel's loop failed",))


def _part(context: Any, module: Any, run_body: Any, given: tuple[Any, ...], room_type: Any) -> Any:
    """A function that calls the body in numba's calling convention. It is separate, so that the
    body is compiled once.
    """
    kind = context.call_conv.get_function_type(types.none, crew.PART)
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
    """The same value with the owners of arrays removed. Otherwise threads would take turns counting
    references at every row.
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


@njit(cache=True, inline="always")
def part(number, of, total):
    """Start and length of part ``number``, when ``total`` is cut into ``of`` parts as evenly as
    possible.
    """
    start = total * number // of
    return start, total * (number + 1) // of - start


@njit(cache=True, inline="always")
def parts(total, most):
    """Number of parts of at most ``most``."""
    return (total + most - 1) // most
