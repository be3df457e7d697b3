"""Processes that compile at once into an empty folder: each signature is kept, under its own
name.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path

import numba

from lockstep.kernels.cpu.codegen import arrays
from support.kernels.run_at_once import run_at_once

COUNT = 20
KERNELS = f"import numba\nCOUNT = {COUNT}\n" + "".join(
    f"@numba.njit(cache=True)\ndef kernel_{i}(x):\n    return x + x * {i}\n" for i in range(COUNT)
)
TYPES = ("int32", "uint8", "float32", "float64")
# Reads a line before it compiles, so that all begin together.
PROCESS = """
import sys
import numpy as np
from pathlib import Path
from numba.core import config, event
from lockstep.kernels.cpu.codegen.compile_lock import CompileLock
import kernels_of_the_test as kernels
event.register("numba:compiler_lock", CompileLock(Path(config.CACHE_DIR)))
functions = [getattr(kernels, f"kernel_{i}") for i in range(kernels.COUNT)]
print("ready", flush=True)
sys.stdin.readline()
for name in sys.argv[1:]:
    for i, function in enumerate(functions):
        value = function(np.dtype(name).type(4))
        assert value == 4 + 4 * i and isinstance(value, float if "float" in name else int), (name, i, value)
print(sum(sum(function.stats.cache_misses.values()) for function in functions))
"""


def start(folder: Path, *types: str) -> subprocess.Popen[str]:
    paths = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-c", PROCESS, *types],
        env=os.environ | {"NUMBA_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": paths},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_four_processes_compile_at_once_and_a_fifth_loads_it_all(tmp_path: Path) -> None:
    (tmp_path / "kernels_of_the_test.py").write_text(KERNELS)
    (tmp_path / "cache").mkdir()
    assert run_at_once([start(tmp_path, name) for name in TYPES], 100.0) == [str(COUNT)] * 4
    assert run_at_once([start(tmp_path, *TYPES)], 100.0) == ["0"], "not all that was compiled is found again"


def test_processes_that_want_the_same_kernels_compile_them_once(tmp_path: Path) -> None:
    (tmp_path / "kernels_of_the_test.py").write_text(KERNELS)
    (tmp_path / "cache").mkdir()
    compiled = run_at_once([start(tmp_path, "float32") for _ in range(2)], 100.0)
    assert sum(map(int, compiled)) == COUNT


def test_kernels_of_the_package_are_compiled_under_the_lock() -> None:
    @numba.njit
    def kernel(x):  # type: ignore[no-untyped-def]
        return x + 1

    kernel(1)  # the folder is there
    done = threading.Event()
    thread = threading.Thread(target=lambda: (kernel(1.0), done.set()))
    with (Path(arrays.CACHE_FOLDER) / "index").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        thread.start()
        assert not done.wait(0.2), "compiled while another process held the lock"
    assert done.wait(60)
    thread.join()
