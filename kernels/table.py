"""The op table: three columns of implementations with one signature.

``Reference`` is plain torch, the definition of every op. ``Cpu`` serves on a CPU, ``Triton`` on
NVIDIA cards. A process chooses its column once, and the choice is logged.
"""

from __future__ import annotations

import functools
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


def _make(column: Column) -> Reference:
    """Imports the kernels of the chosen column only."""
    if column == "cpu":
        from .cpu.column import Cpu

        return Cpu()
    if column == "triton":
        from .triton.column import Triton
        from .triton.target import card_name
        from .triton.tiles import tiles_of

        return Triton(tiles_of(card_name()))
    return Reference()
