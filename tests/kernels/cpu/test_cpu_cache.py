"""Freshly compiled code gives the same bits as code loaded from an earlier process. Otherwise ranks
would differ by which one compiled.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import lockstep

SCRIPT = """
import hashlib, torch
from lockstep.kernels.cpu import gate as cpu_gate, head_products as cpu_head_products, norm as cpu_norm
from lockstep.kernels.routing import Routing
draw = torch.Generator().manual_seed(0)
x = torch.randn(256, 1024, generator=draw).bfloat16()
weight, gate = torch.randn(1024, generator=draw).bfloat16(), torch.randn(131, 1024, generator=draw)
heads, out = torch.randn(8, 128, 128, generator=draw).bfloat16(), torch.empty(256, 8, 128).bfloat16()
for rows in (x, x[:1]):
    norms = cpu_norm.rms_norm(rows, weight, 1e-6), *cpu_norm.add_rms_norm(rows, rows, weight, 1e-6)
    found = *norms, *cpu_gate.gate(rows, gate, None, Routing(4))
    for multiply in (cpu_head_products.multiply_heads, cpu_head_products.multiply_heads_turned):
        multiply(rows.view(-1, 8, 128), heads, out[: len(rows)])
        found = *found, out[: len(rows)].clone()
    print(*(hashlib.md5(each.view(torch.uint8).numpy().tobytes()).hexdigest() for each in found))
"""


def run(folder: Path, *command: str) -> str:
    """The output of a process that keeps its kernels in ``folder``."""
    done = subprocess.run(
        [sys.executable, "-c", *command],
        env=os.environ
        | {"NUMBA_CACHE_DIR": str(folder), "PYTHONPATH": str(Path(lockstep.__path__[0]).parent)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_compiled_and_loaded_code_give_the_same_bits(tmp_path: Path) -> None:
    compiled = run(tmp_path, SCRIPT)
    assert any(tmp_path.rglob("*.nbc")) and run(tmp_path, SCRIPT) == compiled
