"""The rate of a CPU's fused multiply-adds in float32, from registers alone: the limit of products
where no instruction multiplies bf16.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import time
from typing import Any

import numpy as np
from llvmlite import ir
from numba import extending, njit
from numba.core import cgutils, types

from .. import cpu_isa
from ..cpu.codegen.arrays import inner
from ..cpu.codegen.crew import num_threads
from ..cpu.codegen.threads import share_out
from ..cpu.codegen.vectors import LANES, SUMS, all_lanes, multiply_add, total

_STEPS = 100_000
_SAMPLES = 9

_intrinsic: Any = extending.intrinsic  # typed as the definition, which also takes the compiler's context


def fma_flops() -> float:
    """Operations per second on the threads of kernels, two to a multiply-add: the fastest of a few
    runs, since this is a limit.
    """
    threads = num_threads()
    _multiply_on_all(threads)
    samples = []
    for _ in range(_SAMPLES):
        start = time.perf_counter()
        _multiply_on_all(threads)
        samples.append(time.perf_counter() - start)
    return 2.0 * LANES * _num_sums() * _STEPS * threads / min(samples)


def _num_sums() -> int:
    """Sums of 16 lanes that fit the registers and keep both units busy."""
    return 12 if "avx512f" in cpu_isa.features() else 6


@njit(cache=True)
def _multiply_on_all(num_threads):
    sums = np.ones(num_threads, np.float64)
    share_out(_multiply, num_threads, (sums,), False)


@inner()
def _multiply(begin, end, sums):
    for i in range(begin, end):
        sums[i] = _multiply_in_registers(sums[i])


@_intrinsic
def _multiply_in_registers(typing_context, factor):
    """The sum over all lanes, after many multiply-adds of each."""
    signature = types.float64(types.float64)

    def generate(context, builder, signature, arguments):
        sums = [cgutils.alloca_once_value(builder, all_lanes(SUMS, float(n))) for n in range(_num_sums())]
        shrunk = builder.fptrunc(arguments[0], ir.FloatType())
        nothing = ir.Constant(SUMS, ir.Undefined)
        factors = builder.insert_element(nothing, shrunk, ir.Constant(ir.IntType(32), 0))
        lanes = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
        factors = builder.shuffle_vector(factors, nothing, lanes)
        with cgutils.for_range(builder, ir.Constant(ir.IntType(64), _STEPS)):
            for place in sums:
                builder.store(multiply_add(builder, builder.load(place), factors, factors), place)
        whole = total(builder, builder.load(sums[0]))
        for place in sums[1:]:
            whole = builder.fadd(whole, total(builder, builder.load(place)))
        return builder.fpext(whole, ir.DoubleType())

    return signature, generate
