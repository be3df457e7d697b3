"""Processes that compile at once into an empty folder: each signature is kept, under its own
name.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

COUNT = 20
KERNELS = f"import numba\nCOUNT = {COUNT}\n" + "".join(
    f"@numba.njit(cache=True)\ndef kernel_{i}(x):\n    return x + x * {i}\n" for i in range(COUNT)
)
TYPES = ("int32", "uint8", "float32", "float64")
# Reads a line before it compiles, so that all begin together.
PROCESS = """
import sys
import numpy as np
from lockstep.kernels.cpu.codegen import arrays
import kernels_of_the_test as kernels
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


def run_at_once(processes: list[subprocess.Popen[str]]) -> list[str]:
    """The last line of each."""
    for process in processes:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line == "ready\n", line + process.stdout.read()
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    answers = [process.communicate(timeout=100)[0] for process in processes]
    assert not any(process.returncode for process in processes), answers
    return [answer.splitlines()[-1] for answer in answers]


def test_four_processes_compile_at_once_and_a_fifth_loads_it_all(tmp_path: Path) -> None:
    (tmp_path / "kernels_of_the_test.py").write_text(KERNELS)
    (tmp_path / "cache").mkdir()
    assert run_at_once([start(tmp_path, name) for name in TYPES]) == [str(COUNT)] * 4
    assert run_at_once([start(tmp_path, *TYPES)]) == ["0"], "not all that was compiled is found again"


def test_processes_that_want_the_same_kernels_compile_them_once(tmp_path: Path) -> None:
    (tmp_path / "kernels_of_the_test.py").write_text(KERNELS)
    (tmp_path / "cache").mkdir()
    compiled = run_at_once([start(tmp_path, "float32") for _ in range(2)])
    assert sum(map(int, compiled)) == COUNT
