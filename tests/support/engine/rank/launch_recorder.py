"""Recordings of launches on a CPU, in place of CUDA graphs: torch's operations and Triton's kernels
are noted as they run, and repeated over the same memory. What a host read while it recorded, it
does not read again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter

_Launch = Callable[[], None]
_HOST_READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)


class LaunchRecorder:
    """A ``GraphRecorder``. Views launch nothing."""

    def record(self, part: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        part()
        launches: list[_Launch] = []
        notes = _Notes(launches)
        run = interpreter.GridExecutor.__call__

        def launch(grid: Any, *arguments: Any, **named: Any) -> None:
            def again() -> None:
                run(grid, *arguments, **named)

            launches.append(again)
            with torch.utils._python_dispatch._disable_current_modes():
                again()

        with mock.patch.object(interpreter.GridExecutor, "__call__", launch), notes:
            result = part()

        def repeat() -> None:
            for each in launches:
                each()

        return repeat, result


class _Notes(TorchDispatchMode):
    def __init__(self, launches: list[_Launch]) -> None:
        super().__init__()
        self._launches = launches

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in _HOST_READS, f"{func}: the host reads what the device computes"
        named = kwargs or {}
        found = func(*args, **named)
        made = [each for each in tree_leaves(found) if isinstance(each, Tensor)]
        given = {
            each.untyped_storage()._cdata for each in tree_leaves((args, named)) if isinstance(each, Tensor)
        }
        fresh = [each for each in made if each.untyped_storage()._cdata not in given]
        if not fresh and not func._schema.is_mutable:
            return found  # a view

        def again() -> None:
            results = [each for each in tree_leaves(func(*args, **named)) if isinstance(each, Tensor)]
            for target, source in zip(made, results, strict=True):
                if any(target is each for each in fresh):
                    target.copy_(source)

        self._launches.append(again)
        return found
