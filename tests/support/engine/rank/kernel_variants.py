"""Variants of Triton kernels, by what the compiler makes a kernel of its own for: constants,
dtypes, and whether an integer is 1 or a multiple of 16.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from triton.runtime import interpreter

Variant = tuple[str, tuple[tuple[str, str], ...]]


@contextmanager
def noting_variants() -> Iterator[set[Variant]]:
    """The variants of all kernels that are launched meanwhile; none of them runs."""
    found: set[Variant] = set()

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool = False, **named: Any) -> None:
        found.add(_variant(kernel, dict(zip(kernel.arg_names, arguments, strict=False)) | named))

    with mock.patch.object(interpreter.InterpretedFunction, "run", run):
        yield found


def _variant(kernel: Any, arguments: dict[str, Any]) -> Variant:
    unspecialised = set(kernel.kwargs.get("do_not_specialize") or ())
    constants = {name for name, kind in kernel.fn.__annotations__.items() if "constexpr" in str(kind)}
    parts = []
    for name, value in arguments.items():
        constant = name in constants or name not in kernel.arg_names  # the latter are options
        parts.append((name, str(value) if constant else _kind(value, name in unspecialised)))
    return kernel.fn.__name__, tuple(parts)


def _kind(value: Any, unspecialised: bool) -> str:
    if isinstance(value, torch.Tensor):
        return str(value.dtype)
    if not isinstance(value, int):
        return type(value).__name__
    width = "int32" if -(2**31) <= value < 2**31 else "int64"
    if unspecialised:
        return width
    return "1" if value == 1 else f"{width}, by 16" if value % 16 == 0 else width
