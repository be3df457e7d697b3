"""Words of memory that threads share, and the system's calls to wait for one another, for compiled
kernels. Words are 64 bits at an address; every access is sequentially consistent.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import platform
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

_intrinsic: Any = intrinsic  # typed as the definition, which also takes the compiler's context

_WORD, _INT = ir.IntType(64), ir.IntType(32)
_ORDER = "seq_cst"
# LLVM's names of the instruction by machine, and its arguments.
_PAUSES: dict[str, tuple[str, list[Any]]] = {
    "x86_64": ("llvm.x86.sse2.pause", []),
    "aarch64": ("llvm.aarch64.hint", [_INT(1)]),
}


def _at(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, _WORD.as_pointer())


@_intrinsic
def load(typing_context, address):
    """The word at ``address``."""

    def generate(context, builder, signature, arguments):
        return builder.load_atomic(_at(builder, arguments[0]), _ORDER, 8, typ=_WORD)

    return types.intp(types.intp), generate


def _changes(operation: str) -> Any:
    def declare(typing_context, address, value):
        def generate(context, builder, signature, arguments):
            return builder.atomic_rmw(operation, _at(builder, arguments[0]), arguments[1], _ORDER)

        return types.intp(types.intp, types.intp), generate

    declare.__name__ = operation
    return declare


exchange = _intrinsic(_changes("xchg"))  # (address, value): stores; returns the word of before
add = _intrinsic(_changes("add"))  # (address, value): adds; returns the word of before


@_intrinsic
def replace(typing_context, address, expected, value):
    """Stores ``value`` if the word is ``expected``. Whether it was."""

    def generate(context, builder, signature, arguments):
        address, expected, value = arguments
        found = builder.cmpxchg(_at(builder, address), expected, value, _ORDER, _ORDER)
        return builder.extract_value(found, 1)

    return types.boolean(types.intp, types.intp, types.intp), generate


@_intrinsic
def pause(typing_context):
    """Tells the processor that this is a loop that waits."""

    def generate(context, builder, signature, arguments):
        name, given = _PAUSES.get(platform.machine(), (None, []))
        if name:
            kind = ir.FunctionType(ir.VoidType(), [value.type for value in given])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, name), given)
        return context.get_dummy_value()

    return types.void(), generate


def _system_call(name: str, signature: Any) -> Any:
    """A function of the C library that takes addresses and numbers."""

    def declare(typing_context, *arguments):
        def generate(context, builder, signature, arguments):
            kinds = [context.get_value_type(kind) for kind in signature.args]
            function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_INT, kinds), name)
            builder.call(function, arguments)
            return context.get_dummy_value()

        return signature, generate

    return declare


@_intrinsic
def give_way(typing_context):
    """Offers the core to other threads that are ready to run: ``sched_yield``."""
    return _system_call("sched_yield", types.void())(typing_context)


@_intrinsic
def now(typing_context):
    """Nanoseconds of ``CLOCK_MONOTONIC``."""

    def generate(context, builder, signature, arguments):
        time = cgutils.alloca_once(builder, ir.ArrayType(_WORD, 2))  # struct timespec
        kind = ir.FunctionType(_INT, [_INT, time.type])
        read = cgutils.get_or_insert_function(builder.module, kind, "clock_gettime")
        builder.call(read, [_INT(1), time])
        seconds, rest = (builder.load(cgutils.gep_inbounds(builder, time, 0, i)) for i in range(2))
        return builder.add(builder.mul(seconds, _WORD(1_000_000_000)), rest)

    return types.intp(), generate


@_intrinsic
def post(typing_context, semaphore):
    """``sem_post`` of the semaphore at an address."""
    return _system_call("sem_post", types.void(types.intp))(typing_context, semaphore)


@_intrinsic
def wait(typing_context, semaphore):
    """``sem_wait``: sleeps until a post, or a signal."""
    return _system_call("sem_wait", types.void(types.intp))(typing_context, semaphore)
