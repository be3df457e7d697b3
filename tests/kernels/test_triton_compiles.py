"""The Triton kernels through the real compiler for sm_90 (H100, H200), which needs no card: types, shared memory, spills.

The interpreter shows what a kernel computes; it accepts programs that the compiler refuses.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED_PER_PROGRAM = 227 * 1024  # CUDA programming guide, compute capability 9.0
PROGRAM = Path(__file__).parent.parent / "support" / "triton_compile.py"
MATRIX_KERNELS = {
    "triton_experts._up_kernel",
    "triton_experts._down_kernel",
    "triton_experts_fp8._up_fp8_kernel",
    "triton_experts_fp8._down_fp8_kernel",
    "triton_attend._attend_kernel",
    "triton_mla_prefill._expand_kernel",
    "triton_mla_prefill._attend_window_kernel",
}


@pytest.fixture(scope="module")
def needs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, int]]]:
    pytest.importorskip("triton.backends.nvidia", reason="Triton without its NVIDIA compiler")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    result = subprocess.run([sys.executable, str(PROGRAM)], capture_output=True, text=True, timeout=110, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    found: dict[str, list[dict[str, int]]] = json.loads(result.stdout)
    return found


def test_every_kernel_compiles(needs: dict[str, list[dict[str, int]]]) -> None:
    folder = Path(__file__).parent.parent.parent / "kernels"
    kernels = set()
    for path in folder.glob("triton_*.py"):
        lines = path.read_text(encoding="utf-8").splitlines()
        defined = [line for before, line in itertools.pairwise(lines) if before.startswith("@triton.jit")]
        names = [line.removeprefix("def ").partition("(")[0] for line in defined]
        kernels |= {f"{path.stem}.{name}" for name in names if name.endswith("_kernel")}
    assert set(needs) == kernels


def test_kernels_fit_and_spill_nothing(needs: dict[str, list[dict[str, int]]]) -> None:
    for name, variants in needs.items():
        for variant in variants:
            assert variant["shared"] <= SHARED_PER_PROGRAM, (name, variant)
            assert variant["spilled"] == 0, (name, variant)


def test_products_use_the_matrix_units(needs: dict[str, list[dict[str, int]]]) -> None:
    for name in MATRIX_KERNELS:
        assert all(variant["tensor_cores"] for variant in needs[name]), name
