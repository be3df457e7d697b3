"""The op table: three columns of implementations with one signature.

``Reference`` is plain torch, the definition of every op. ``Cpu`` serves on a CPU, ``Triton`` on
NVIDIA cards. A process chooses its column once, and the choice is logged.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Mapping
from typing import Any, Literal, get_args

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


def with_libraries(ops: Reference, libraries: Mapping[str, str], device: torch.device) -> Reference:
    """The ops with those of the libraries that a recipe names, by op (section ``kernels``). Raises
    ValueError where one is not installed, or not for the device.
    """
    for op, name in libraries.items():
        if (op, name) not in _LIBRARIES:
            allowed = ["own", *(known for where, known in _LIBRARIES if where == op)]
            raise ValueError(f"kernels.{op} = {name}: allowed are {', '.join(allowed)}")
        if device.type != "cuda":
            raise ValueError(f"kernels.{op} = {name}: serves on GPUs, not on {device}; use own")
        module, package, use = _LIBRARIES[op, name]
        try:
            library = importlib.import_module(module)
        except (ImportError, OSError) as error:  # OSError: its CUDA is not this process's
            raise ValueError(f"kernels.{op} = {name}: {error}; install {package} or use own") from error
        ops = use(ops, library, device)
        _log.info("kernels: %s by %s", op, name)
    return ops


def _with_deep_gemm(ops: Reference, library: Any, device: torch.device) -> Reference:
    from .libraries.deep_gemm import DeepGemm
    from .triton.column import Triton
    from .triton.target import card_arch

    assert isinstance(ops, Triton)
    return ops.with_product(functools.partial(DeepGemm, library, card_arch()))


def _with_flashinfer(ops: Reference, library: Any, device: torch.device) -> Reference:
    from .libraries.flashinfer import FlashInfer
    from .triton.column import Triton
    from .triton.target import card_arch

    assert isinstance(ops, Triton)
    return ops.with_decode(functools.partial(FlashInfer, library, card_arch(), device))


def _with_flash_mla(ops: Reference, library: Any, device: torch.device) -> Reference:
    from .libraries.flash_mla import FlashMlaChosen, FlashMlaRows, check_flash_mla
    from .triton.column import Triton
    from .triton.target import card_arch

    assert isinstance(ops, Triton)
    check_flash_mla(library)
    arch = card_arch()
    ops = ops.with_decode(functools.partial(FlashMlaRows, library, arch))
    return ops.with_chosen(FlashMlaChosen(library, arch))


def _with_flash_attn_4(ops: Reference, library: Any, device: torch.device) -> Reference:
    from .libraries.flash_attn_4 import FlashAttention4
    from .triton.column import Triton
    from .triton.target import card_arch

    assert isinstance(ops, Triton)
    return ops.with_extend(functools.partial(FlashAttention4, library, card_arch()))


_LIBRARIES = {
    ("linear_fp8", "deep_gemm"): ("deep_gemm", "sgl-deep-gemm", _with_deep_gemm),
    ("attention", "flashinfer"): ("flashinfer", "flashinfer-python", _with_flashinfer),
    ("attention", "flashmla"): ("flash_mla", "sgl-flash-mla", _with_flash_mla),
    ("prompt_attention", "flash_attn_4"): ("flash_attn.cute", "flash-attn-4", _with_flash_attn_4),
}
"""By op and name: the module, its package, and the ops with it."""


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
