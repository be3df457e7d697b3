"""The op table: three columns of implementations with one signature.

``Reference`` is plain torch, the definition of every op. ``Cpu`` serves on a CPU, ``Triton`` on
NVIDIA cards. A process chooses its column once, and the choice is logged.
"""

from __future__ import annotations

import functools
import importlib
import logging
from typing import Literal, get_args

import torch

from .reference.column import Reference

Column = Literal["reference", "cpu", "triton"]

_log = logging.getLogger(__name__)


def column_for(device: torch.device) -> Column:
    """The column that serves on a device."""
    return "cpu" if device.type == "cpu" else "triton"


@functools.cache
def ops_of(column: Column) -> Reference:
    """The ops of a column. Raises ValueError for an unknown column, ImportError where Triton is not
    installed.
    """
    if column not in get_args(Column):
        raise ValueError(f"kernels: {column!r} is no column; allowed: {', '.join(get_args(Column))}")
    ops = _make(column)
    _log.info("kernels: column %s", column)
    return ops


def with_library(ops: Reference, linear_fp8: str, device: torch.device) -> Reference:
    """The ops with those of libraries that a recipe names (section ``kernels``). Raises ValueError
    where one is not installed, or not for the device.
    """
    if linear_fp8 == "own":
        return ops
    if linear_fp8 != "deep_gemm":
        raise ValueError(f"kernels.linear_fp8 = {linear_fp8}: allowed are own and deep_gemm")
    if device.type != "cuda":
        raise ValueError(f"kernels.linear_fp8 = deep_gemm: serves on GPUs, not on {device}; use own")
    try:
        library = importlib.import_module("deep_gemm")
    except ImportError as error:
        raise ValueError(
            f"kernels.linear_fp8 = deep_gemm: {error}; install sgl-deep-gemm or use own"
        ) from error
    from .libraries.deep_gemm import DeepGemm
    from .triton.column import Triton
    from .triton.target import card_arch

    assert isinstance(ops, Triton)
    _log.info("kernels: FP8 products of many rows by deep_gemm")
    return ops.with_product(functools.partial(DeepGemm, library, card_arch()))


def _make(column: Column) -> Reference:
    """Imports the kernels of the chosen column only."""
    if column == "cpu":
        from .cpu.column import Cpu

        return Cpu()
    if column == "triton":
        from .triton.column import Triton
        from .triton.target import card_arch, card_name
        from .triton.tiles import tiles_of

        return Triton(tiles_of(card_name(), arch=card_arch()))
    return Reference()
