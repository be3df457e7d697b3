"""Kernel loops shared among threads: every number once, with any arguments, and bodies compiled
once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numba
import numpy as np
import pytest
import torch
from numba.core import event

from lockstep.kernels.cpu.codegen.arrays import inner, use_threads_of_torch
from lockstep.kernels.cpu.codegen.threads import share_out


class Pair(NamedTuple):
    """A tuple argument of a kernel."""

    array: Any
    number: int


@inner()
def mark(begin, end, seen_N, pair, factor, nothing, parts):  # type: ignore[no-untyped-def]
    """Counts every number; counts the non-empty parts in the last column."""
    for n in range(begin, end):
        seen_N[n] += 1
        pair.array[n] = factor * (pair.number + n) + (1 if nothing is None else 0)
    if begin < end:
        parts[begin] = end - begin


@numba.njit
def run(seen_N, array_N, parts, count, alone):  # type: ignore[no-untyped-def]
    share_out(mark, count, (seen_N, Pair(array_N, 10), np.float32(0.5), None, parts), alone)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    use_threads_of_torch()
    yield request.param
    torch.set_num_threads(before)
    use_threads_of_torch()


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("count", [0, 1, 2, 63, 64, 65, 1000])
def test_every_number_once(count: int, alone: bool, threads: int) -> None:
    seen_N, array_N, parts = (
        np.zeros(count + 1, np.int64),
        np.zeros(count + 1, np.float32),
        np.zeros(count + 1, np.int64),
    )
    run(seen_N, array_N, parts, count, alone)
    assert seen_N[:count].all() and seen_N.sum() == count, f"{threads} threads"
    assert (array_N[:count] == 0.5 * (10 + np.arange(count)) + 1).all()
    sizes = parts[parts > 0]
    assert sizes.sum() == count and (
        len(sizes) == min(count, 1) if alone else not count or sizes.max() - sizes.min() <= 1
    )


class _Names(event.Listener):
    def __init__(self) -> None:
        self.names: list[str] = []

    def on_start(self, event: event.Event) -> None:
        self.names.append(event.data["dispatcher"].__name__)

    def on_end(self, event: event.Event) -> None:
        """Compiled."""


def test_a_body_is_compiled_once_and_is_there_once() -> None:
    @inner()
    def body(begin, end, x_N):  # type: ignore[no-untyped-def]
        for n in range(begin, end):
            x_N[n] += 1

    @numba.njit
    def kernel(x_N):  # type: ignore[no-untyped-def]
        share_out(body, len(x_N), (x_N,), len(x_N) < 100)

    names = _Names()
    with event.install_listener("numba:compile", names):
        kernel(np.zeros(3))
    assert sorted(names.names)[-2:] == ["body", "kernel"] and names.names.count("body") == 1
    parts = [
        line
        for line in kernel.inspect_llvm(kernel.signatures[0]).splitlines()
        if line.startswith("define internal")
    ]
    assert len(parts) == 1, parts
