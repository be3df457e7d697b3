"""Products with weights in blocks on CPUs without AVX512-BF16, in bf16 and float32: the same bits
on AVX2 and AVX-512, the reference's values, and nothing but registers in the innermost loops.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lockstep.kernels import cpu_isa
from lockstep.kernels.cpu_isa import Isa
from lockstep.kernels.reference.experts import ExpertForm, experts_reference
from lockstep.launch.environment import isa_settings
from support.kernels.assembly import loops_with

TESTS = Path(__file__).parents[3]
LIMITS: list[Isa] = ["avx2", "avx512"]
ROWS = (1, 2, 3, 4, 5, 6, 7, 13, 200)
DTYPES = (torch.bfloat16, torch.float32)


def skip_beyond(limit: Isa) -> None:
    if cpu_isa.lesser(limit, cpu_isa.here()) != limit:
        pytest.skip(f"this process computes with {cpu_isa.here()} only")


def limited(limit: Isa, *command: str, **settings: str) -> str:
    """The output of a Python process that is limited to these instructions."""
    result = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
        env=os.environ | isa_settings(limit) | settings,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def drawn(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor], Tensor, Tensor]:
    """Rows, a weight and a bias; weights of three slots, and the row and slot of each pair."""
    draw = torch.Generator().manual_seed(0)
    x, weight, bias, w13, w2 = (
        torch.randn(*shape, generator=draw).to(dtype) / 8
        for shape in ((200, 66), (112, 66), (112,), (3, 64, 66), (3, 66, 32))
    )
    w2 = F.pad(w2, (0, 0, 0, 14))  # 80 columns; those of x are 66, then zeros
    x, w13 = (F.pad(each, (0, 14)) for each in (x, w13))
    rows, slots = torch.arange(200).repeat_interleave(2), torch.randint(-1, 3, (400,), generator=draw)
    return x, F.pad(weight, (0, 14)), bias, (w13, w2), rows, slots


_COMPUTE = """
import sys, torch
sys.path[:0] = sys.argv[2:]
from test_cpu_block_tiles import DTYPES, ROWS, drawn, form_of
from lockstep.kernels import cpu_isa
from lockstep.kernels.table import ops_of
ops = ops_of("cpu")
found = []
for dtype in DTYPES:
    x, weight, bias, slots, rows_M, slots_M = drawn(dtype)
    packed, experts = ops.pack(weight), ops.pack_slots(*slots)
    assert packed.dim() == 4 and experts[0].dim() == 5, cpu_isa.here()
    whole = ops.linear(x, packed, bias)
    for count in ROWS:
        assert torch.equal(ops.linear(x[:count], packed, bias), whole[:count]), count
    counts, form = torch.zeros(3, dtype=torch.int64), form_of(dtype)
    each = ops.experts(x, rows_M, slots_M, *experts, counts, form)
    some = ops.experts(x, rows_M[7:10], slots_M[7:10], *experts, torch.zeros(3, dtype=torch.int64), form)
    assert torch.equal(some, each[7:10])
    found += [whole, each, counts]
torch.save(found, sys.argv[1])
"""


def form_of(dtype: torch.dtype) -> ExpertForm:
    """Biases of the slots; the plain activation."""
    draw = torch.Generator().manual_seed(1)
    up, down = (torch.randn(3, width, generator=draw).to(dtype) / 8 for width in (64, 80))
    return ExpertForm(biases=(up, down))


def test_avx2_and_avx512_give_the_same_bits_and_the_values_of_the_reference(tmp_path: Path) -> None:
    found = []
    for limit in LIMITS:
        skip_beyond(limit)
        limited(limit, "-c", _COMPUTE, str(tmp_path / limit), str(Path(__file__).parent), str(TESTS))
        found.append(torch.load(tmp_path / limit))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    for i, (dtype, least) in enumerate(zip(DTYPES, (2**-8, 1e-5), strict=True)):
        x, weight, bias, slots, rows, chosen = drawn(dtype)
        whole, each, counted = found[0][3 * i : 3 * i + 3]
        exact = F.linear(x.double(), weight.double(), bias.double())
        torch.testing.assert_close(whole.double(), exact, rtol=least, atol=least / 40)
        counts = torch.zeros(3, dtype=torch.int64)
        expected = experts_reference(x, rows, chosen, *slots, counts, form_of(dtype))
        torch.testing.assert_close(each, expected, rtol=5 * least, atol=2.5 * least)
        assert torch.equal(counted, counts)


def test_linear_experts_and_sublayers_on_a_lesser_cpu() -> None:
    """Their own tests, in a process with AVX2, whose bits are those of AVX-512."""
    limit: Isa = "avx2"
    files = ("cpu/test_cpu_linear.py", "reference/test_experts.py", "reference/test_sublayers.py")
    command = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    paths = [str(TESTS / "kernels" / file) for file in files]
    assert " passed" in limited(limit, *command, *paths, LOCKSTEP_TEST_ISA=limit)


_COMPILE = """
import torch
from lockstep.kernels.cpu.codegen import blocks
from lockstep.kernels.cpu.linear import linear
linear(torch.ones(1, 32).{dtype}(), blocks.pack_blocks(torch.ones(16, 32).{dtype}()))
print(*blocks.multiply_slots.inspect_asm().values())
"""


@pytest.mark.parametrize(
    ("limit", "dtype", "most"),
    [("avx2", "bfloat16", 24), ("avx512", "bfloat16", 48), ("avx2", "float", 12), ("avx512", "float", 24)],
)
def test_innermost_loops_keep_sums_in_registers(limit: Isa, dtype: str, most: int, tmp_path: Path) -> None:
    """Holds loops over units to their products: no call, no vector on the stack."""
    skip_beyond(limit)
    code = _COMPILE.format(dtype=dtype)
    loops = loops_with("vfmadd", limited(limit, "-c", code, NUMBA_CACHE_DIR=str(tmp_path)))
    products = [sum(line.startswith("vfmadd") for line in loop) for loop in loops]
    assert max(products) == most
    for loop in loops:
        assert not [line for line in loop if line.startswith("call")]
        assert not [line for line in loop if re.search(r"\(%rsp.*mm|mm.*\(%rsp", line)], loop
