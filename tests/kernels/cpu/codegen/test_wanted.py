"""Kernels are noted without being compiled, then compiled by several processes, each by one."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path

import numba
import numpy as np
import pytest

from lockstep.kernels.cpu.codegen import arrays, compiling
from lockstep.kernels.cpu.codegen.wanted import Wanted, only_noted
from support.kernels.run_at_once import run_at_once


@numba.njit
def doubled(x, out):  # type: ignore[no-untyped-def]
    out[0] = 2 * x


@numba.njit
def sums(x):  # type: ignore[no-untyped-def]
    return x + 1, x + 2


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(arrays, "CACHE_FOLDER", str(tmp_path))
    return tmp_path


def noted(kind: type[np.generic] = np.float64) -> list[Wanted]:
    """Three calls. Kernels that are compiled are not noted again, so each test has a kind."""
    out = np.zeros(1, kind)
    with only_noted() as found:
        for value in (1, 2, 2.0):
            doubled(value, out)
        assert sums(kind(3)) == (4, 5)  # runs as Python
    assert out == 0
    return found


def test_calls_are_noted_once_for_each_combination_of_types() -> None:
    assert [(kernel.name, str(kernel.types[0])) for kernel in noted()] == [
        ("doubled", "int64"),
        ("doubled", "float64"),
        ("sums", "float64"),
    ]


def test_progress_has_a_count_and_a_second_start_tells_nothing(folder: Path) -> None:
    wanted, told = noted(np.int32), list[str]()
    compiling.compile_shared(wanted, told.append)
    assert [line.rpartition(": ")[2] for line in told] == [f"{i} of 3 compiled" for i in range(3)]
    compiling.compile_shared(wanted, told.append)
    assert len(told) == 3


def test_a_kernel_that_another_process_compiles_is_waited_for(folder: Path) -> None:
    wanted, waits, done = noted(np.uint8)[:2], threading.Event(), threading.Event()
    claim = (folder / f"claim-{wanted[0].digest}").open("w")
    fcntl.flock(claim, fcntl.LOCK_EX)
    thread = threading.Thread(
        target=lambda: (compiling.compile_shared(wanted, lambda _: waits.set()), done.set())
    )
    thread.start()
    try:
        assert waits.wait(60), "nothing was said"
        assert not done.wait(0.2), "did not wait"
    finally:
        claim.close()
    assert done.wait(60), "did not go on when the other process had ended"
    thread.join()


PROCESS = """
import sys
from lockstep.kernels.cpu import norm
from lockstep.kernels.cpu.codegen import arrays, compiling
from lockstep.kernels.cpu.codegen.wanted import only_noted
import torch
def run():
    x = torch.ones(4, 64)
    return norm.rms_norm(x, x[0], 1e-6), norm.silu_mul(x)
if __name__ == "__main__":
    with only_noted() as wanted:
        run()
    assert len(wanted) == 2, wanted
    print("ready", flush=True)
    sys.stdin.readline()
    compiling.compile_shared(wanted, lambda _: None, int(sys.argv[1]))
    run()
    print(sum(sum(kernel.stats.cache_misses.values()) for kernel in (norm.norm_rows, norm._silu_mul)))
"""


@pytest.mark.parametrize(("processes", "helpers"), [(2, 0), (1, 1)])
def test_processes_share_the_kernels_among_them(processes: int, helpers: int, tmp_path: Path) -> None:
    script = tmp_path / "process.py"
    script.write_text(PROCESS)
    started = [
        subprocess.Popen(
            [sys.executable, str(script), str(helpers)],
            env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "cache")},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(processes)
    ]
    misses = [int(line) for line in run_at_once(started, 280.0)]
    assert sum(misses) == 2 if not helpers else sum(misses) <= 2, misses
    assert len([path for path in (tmp_path / "cache").rglob("claim-*") if path.stat().st_size]) == 2
