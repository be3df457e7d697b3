"""What the Triton kernels know of the device they run on."""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

# Kernels accumulate in float32, so float64 is not among them.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which takes the bits of bf16 for integers in
    ``tl.dot`` (3.7.1, 3.9.0): operands are then widened to float32 first, which changes no
    product.
    """
    return bool(triton.knobs.runtime.interpret)


def card_name() -> str:
    """The name that the driver gives the card; empty where there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


@functools.cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors; 4 stand in on a CPU, and an H100's 132 for tensors without memory
    (``meta``).
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 132 if device.type == "meta" else 4


def power_of_two(value: int) -> int:
    """The next power of two, at least 1."""
    return int(triton.next_power_of_2(max(value, 1)))


def check_dtype(tensor: Tensor, name: str) -> None:
    if tensor.dtype not in DTYPES:
        allowed = ", ".join(str(dtype) for dtype in DTYPES)
        raise ValueError(f"{name}: the Triton kernels have no {tensor.dtype}; allowed: {allowed}")
