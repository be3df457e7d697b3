"""Tensors as compiled CPU kernels see them: numpy arrays over the same memory, with bf16 as its 16
bits.

Numba compiles the kernels. It needs no C compiler and keeps compiled code on disk
(``cache_folder.py``). Loops of kernels run on threads of their own (``crew.py``).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from numba.core import config, event, types
from numba.extending import intrinsic, overload, register_jitable
from numpy.typing import NDArray
from torch import Tensor

from . import crew
from .cache_folder import cache_folder
from .compile_lock import CompileLock, save_one_at_a_time

CACHE_FOLDER = cache_folder(
    Path(__file__).parents[1],
    config.CACHE_DIR,  # type: ignore[attr-defined]
    numba.__version__,
)
COMPILE_LOCK = CompileLock(Path(CACHE_FOLDER))

# Set before the first kernel is declared.
config.CACHE_DIR = CACHE_FOLDER  # type: ignore[attr-defined]
event.register("numba:compiler_lock", COMPILE_LOCK)
save_one_at_a_time()

# Up to this many values, a pass over rows stays on the calling thread: 4 us, and no waiting for a
# thread that another process may hold up.
ALONE = 1 << 13

# Compiled code may reassociate sums, which vectors need, but must keep infinities: masked logits
# and maxima start from them. Not in loops that read one array and write another: where addresses
# are close the compiler takes single values instead of vectors, and would sum in another order.
# Kernels that reassociate are declared with ``forceinline``, and every function they call inherits
# it unless it calls ``stay_apart``. If the functions were not inlined, each caller would bring its
# own copy that sums in another order. The linker's choice among the copies differs between the
# process that compiles and those that load.
FAST = {"reassoc", "contract", "nsz", "arcp"}


def use_threads_of_torch() -> None:
    """Lets kernels of this process use as many threads as torch does in this thread."""
    crew.set_num_threads(torch.get_num_threads())


def array(x: Tensor) -> NDArray[Any]:
    """Numpy view of x's memory, with its strides; uint16 if x is bf16."""
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()


def made(shape: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, NDArray[Any]]:
    """A new bf16 or float32 tensor and its numpy view. Takes 1 us; ``torch.empty`` plus ``array``
    take 2.4.
    """
    bits = np.empty(shape, np.uint16 if dtype == torch.bfloat16 else np.float32)
    x = torch.from_numpy(bits)
    return (x.view(dtype) if dtype == torch.bfloat16 else x), bits


def computes(dtype: torch.dtype) -> bool:
    """Whether kernels read and write tensors of this dtype."""
    return dtype in (torch.bfloat16, torch.float32)


def inner(**options: Any) -> Any:
    """Declares a function that only kernels call. It is compiled into them, with no entry point of
    its own. Called from Python it runs as Python.
    """
    return register_jitable(no_cfunc_wrapper=True, **options)


_intrinsic: Any = intrinsic  # typed as the definition, which also takes the compiler's context


@_intrinsic
def stay_apart(typing_context):
    """In kernels: prevents inlining of the function that calls this, and unrolling of its loops.
    Without it some callers took four times as long to compile. For coarse calls, and not with
    ``FAST``.
    """

    def generate(context, builder, signature, arguments):
        builder.function.attributes.discard("alwaysinline")
        builder.function.attributes.add("noinline")
        builder.function.attributes.add("optsize")
        return context.get_dummy_value()

    return types.void(), generate


@_intrinsic
def _halves(typing_context, address):
    """A pointer to the 16-bit values at an address."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.uint16)(types.intp), generate


@register_jitable
def keep(array):
    """In kernels: holds an array up to here, of which only the address is used before. Compiled
    code frees arrays after their last use.
    """


@register_jitable
def matrix(address, num_rows, num_columns):
    """In kernels: the bf16 [num_rows, num_columns] at an address, as bits. A tensor's address costs
    its caller less than a numpy view, once weights have driven torch's code from the caches: the
    rows of a sublayer took 9 instead of 25 us at one row, 35 instead of 110 at eight.
    """
    return numba.carray(_halves(address), (num_rows, num_columns))  # type: ignore[attr-defined]


def widen(value: Any) -> Any:
    """In kernels: an array element as float32. Eight bits are read as e4m3, as in
    ``fp8.from_e4m3``.
    """
    raise NotImplementedError


def narrow(value: Any, array: Any) -> Any:
    """In kernels: a float32 as an element of ``array``, rounded to nearest, ties to even."""
    raise NotImplementedError


@overload(widen, inline="always")
def _widen(value):
    if value == types.uint8:

        def from_e4m3(value):
            moved = np.uint32(np.int32(np.int8(value)) << np.int32(20)) & np.uint32(0x87F00000)
            return np.uint32(moved).view(np.float32) * np.float32(2.0**120)

        return from_e4m3
    if isinstance(value, types.Integer):
        return lambda value: np.uint32(np.uint32(value) << np.uint32(16)).view(np.float32)
    return lambda value: value


@overload(narrow, inline="always")
def _narrow(value, array):
    if isinstance(array.dtype, types.Integer):

        def to_bits(value, array):
            bits = np.float32(value).view(np.uint32)
            return np.uint16(
                np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
                >> np.uint32(16)
            )

        return to_bits
    return lambda value, array: np.float32(value)


@numba.njit(cache=True, inline="always")
def exp(x):
    """Vectorized float32 e^x, within 2 units in the last place; 0 below -87, at most e^88."""
    x = min(max(x, np.float32(-87.3)), np.float32(88.0))
    scaled = x * np.float32(1.4426950408889634)
    whole = np.floor(scaled + np.float32(0.5))
    # ln 2 in two parts (Cody and Waite).
    rest = (x - whole * np.float32(0.693359375)) + whole * np.float32(2.12194440e-4)
    y = np.float32(1.9875691500e-4)  # the polynomial of Cephes' expf
    y = y * rest + np.float32(1.3981999507e-3)
    y = y * rest + np.float32(8.3334519073e-3)
    y = y * rest + np.float32(4.1665795894e-2)
    y = y * rest + np.float32(1.6666665459e-1)
    y = y * rest + np.float32(5.0000001201e-1)
    y = y * rest * rest + rest + np.float32(1)
    return y * np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)
