"""The device that the Triton kernels run on, as far as they need to know it."""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

_ROWS = 64

# Without float64, because kernels accumulate in float32.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter. It reads the bits of bf16 as integers in
    ``tl.dot`` (3.7.1, 3.9.0), so operands are first widened to float32, which changes no product.
    """
    return bool(triton.knobs.runtime.interpret)


def card_name() -> str:
    """The driver's name of the card; empty without a card."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def card_arch() -> int:
    """Its compute capability as a number: 90 for an H100, and without a card."""
    if not torch.cuda.is_available():
        return 90
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


@functools.cache
def num_processors(device: torch.device) -> int:
    """Number of streaming multiprocessors. A CPU counts as 4; tensors without memory (``meta``)
    count as an H100's 132.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 132 if device.type == "meta" else 4


def padded_rows(num_rows: int) -> int:
    """Lanes for the rows of a step: the same for nearly every step, since each number of lanes is a
    kernel of its own.
    """
    return max(_ROWS, power_of_two(num_rows))


def power_of_two(value: int) -> int:
    """The next power of two, at least 1."""
    return int(triton.next_power_of_2(max(value, 1)))


def check_dtype(tensor: Tensor, name: str) -> None:
    if tensor.dtype not in DTYPES:
        allowed = ", ".join(str(dtype) for dtype in DTYPES)
        raise ValueError(f"{name}: the Triton kernels have no {tensor.dtype}; allowed: {allowed}")
