"""Products of float32 rows with weights in 4 bits: the same bits on AVX2 and AVX-512 and for any
number of rows, with sums in registers.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from lockstep.kernels import cpu_isa
from lockstep.kernels.cpu_isa import Isa
from lockstep.launch.environment import isa_settings
from support.kernels.assembly import loops_with

LIMITS: list[Isa] = ["avx2", "avx512"]

_COMPUTE = """
import sys, torch
from numba import float32, int64, njit, types, uint8
from lockstep.kernels.cpu.codegen.float_nibbles import decoded_dots
from lockstep.kernels.cpu.experts_four_bit import experts_four_bit
from lockstep.kernels.formats.four_bit_format import MXFP4
from lockstep.kernels.reference.four_bit import quantise
draw = torch.Generator().manual_seed(0)
w13, w2 = (quantise(torch.randn(1, *s, generator=draw), MXFP4) for s in ((272, 200), (200, 136)))
x = torch.randn(20, 200, generator=draw)
def run(count):
    rows, slots = torch.arange(count), torch.zeros(count, dtype=torch.int64)
    return experts_four_bit(x, rows, slots, w13, w2, torch.zeros(1, dtype=torch.int64))
whole = run(20)
for count in (1, 2, 3, 4, 5, 6, 7, 16, 17):
    assert torch.equal(run(count), whole[:count]), count
torch.save(whole, sys.argv[1])
@njit
def dots(num_rows, rows, scales, weights, out):
    decoded_dots(num_rows, rows, scales, weights, out)
dots.compile((int64, int64[::1], uint8[:, ::1], types.UniTuple(int64, 9), float32[:, :, ::1]))
print(*dots.inspect_asm().values())
"""


def test_avx2_and_avx512_give_the_same_bits_and_keep_sums_in_registers(tmp_path: Path) -> None:
    """For 1 to 20 rows: those multiplied as codes are decoded, and with weights decoded before."""
    limits = [limit for limit in LIMITS if cpu_isa.lesser(limit, cpu_isa.here()) == limit]
    for limit in limits:
        result = subprocess.run(
            [sys.executable, "-c", _COMPUTE, str(tmp_path / limit)],
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
            env=os.environ | isa_settings(limit) | {"NUMBA_CACHE_DIR": str(tmp_path)},
        )
        assert result.returncode == 0, result.stdout + result.stderr
        check_loops(result.stdout)
    found = [torch.load(tmp_path / limit) for limit in limits]
    assert all(torch.equal(one, found[0]) for one in found)


def check_loops(assembly: str) -> None:
    """Holds loops that decode and multiply to registers: no call, no vector put on the stack."""
    loops = loops_with("vpshufb", assembly)
    assert len(loops) >= 5
    for loop in loops:
        assert not [line for line in loop if line.startswith("call")]
        assert not [line for line in loop if re.search(r"%[xyz]mm\d+, \S*\(%rsp", line)], loop
