"""Compiles Triton kernels ahead of use, in as many processes as there are cores.

A kernel takes half a second to compile. A benchmark with its tuning has hundreds of variants, which
would take minutes one after another. Ops run on tensors without memory (``meta``), and every launch
stops once its kernel is compiled. The measuring process finds the compiled kernels in Triton's
cache on disk. No card is used or needed.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections.abc import Sequence
from typing import Any

import torch

from ..triton.column import Triton
from ..triton.tiles import Tiles
from .cases import cases

Job = tuple[str, str, Tiles]  # op and shape of a case, and the tiles to compile it with
_ARCH = 90  # H100 and H200, assumed without a card


class AbsentCard:
    """The driver calls that Triton makes before it compiles."""

    def __init__(self, arch: int) -> None:
        self._arch = arch

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_ahead(jobs: Sequence[Job]) -> list[str]:
    """Compiles the kernels that the jobs launch. Returns those that failed: a candidate may ask for
    more than the card has.
    """
    arch = _ARCH
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        arch = 10 * major + minor
    count = max(1, min(len(jobs), (os.cpu_count() or 2) - 1))
    # Neighbouring jobs launch the same kernels. Dealt out in runs, they meet in one process.
    size = -(-len(jobs) // (4 * count))
    parts = [list(jobs[begin : begin + size]) for begin in range(0, len(jobs), size)]
    with multiprocessing.get_context("spawn").Pool(
        count, initializer=stop_after_compiling, initargs=(arch,)
    ) as pool:
        return [failure for failures in pool.imap_unordered(_compile, parts) for failure in failures]


def stop_after_compiling(arch: int) -> None:
    """Makes all later launches in this process compile for a card of that kind and do nothing
    else.
    """
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def only_compile(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **options)

    driver.set_active(AbsentCard(arch))
    JITFunction.run = only_compile


def _compile(jobs: list[Job]) -> list[str]:
    torch.set_num_threads(1)
    known = {(case.op, case.shape): case for case in cases()}
    failures = []
    for op, shape, tiles in jobs:
        try:
            known[op, shape].make(torch.device("meta")).bind(_ops(tiles))()
        except Exception as error:  # the measuring run fails the same way and reports it
            failures.append(f"{op} {shape}: {type(error).__name__}: {error}".split("\n")[0][:200])
    return failures


@functools.lru_cache(maxsize=64)
def _ops(tiles: Tiles) -> Any:
    return Triton(tiles)
