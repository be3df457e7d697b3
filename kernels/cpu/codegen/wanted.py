"""Kernels that a computation will call, found by a run of it that compiles none."""

# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numba.core.dispatcher import Dispatcher


@dataclass(frozen=True)
class Wanted:
    """A kernel and the types of its arguments, as numba names them."""

    module: str
    name: str
    types: tuple[Any, ...]

    @property
    def digest(self) -> str:
        """A name for files."""
        return hashlib.sha256(f"{self.module} {self.name} {self.types}".encode()).hexdigest()[:24]

    def compile(self) -> None:
        """Compiles the kernel for these types, or loads it from the disk."""
        getattr(sys.modules[self.module], self.name).compile(self.types)


@contextlib.contextmanager
def only_noted() -> Iterator[list[Wanted]]:
    """Within, calls of kernels that this process has not compiled are noted, once each, in the
    order of the calls. They do nothing; those that return a value run as Python.

    New arrays of kernels are zeros within: results that nothing has written must be valid indices.
    """
    found: list[Wanted] = []
    kernels = __package__.rpartition(".")[0]
    modules = [module for name, module in sys.modules.items() if name.startswith(f"{kernels}.")]
    with contextlib.ExitStack() as stack:
        stack.enter_context(_replaced(Dispatcher, "_compile_for_args", _noting(found)))
        for name, library in (("np", _Zeroed(np)), ("torch", _Zeroed(torch))):
            for module in modules:
                if hasattr(module, name):
                    stack.enter_context(_replaced(module, name, library))
        yield found


class _Zeroed:
    """A library whose ``empty`` makes zeros. The library itself stays as it is: numba looks its
    functions up by identity.
    """

    def __init__(self, library: Any) -> None:
        self._library = library
        self.empty = library.zeros
        self.empty_like = library.zeros_like

    def __getattr__(self, name: str) -> Any:
        return getattr(self._library, name)


def _noting(found: list[Wanted]) -> Callable[..., Callable[..., Any]]:
    def note(self: Any, *arguments: Any, **_: Any) -> Callable[..., Any]:
        types = tuple(self.typeof_pyval(argument) for argument in arguments)
        wanted = Wanted(self.py_func.__module__, self.py_func.__qualname__, types)
        known = getattr(sys.modules.get(wanted.module), wanted.name, None) is self
        if known and wanted not in found:
            found.append(wanted)
        function: Callable[..., Any] = self.py_func
        return function if _returns(function) else lambda *_: None

    return note


@functools.cache
def _returns(function: Any) -> bool:
    """Whether a function returns a value; the others write their results into arrays."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return any(isinstance(node, ast.Return) and node.value is not None for node in ast.walk(tree))


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
