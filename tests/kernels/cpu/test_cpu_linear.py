"""Packed weights against plain ones."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from lockstep.kernels import cpu_isa
from lockstep.kernels.cpu.codegen import blocks as cpu_blocks
from lockstep.kernels.cpu.linear import linear, pack, pack_for_onednn, pack_slots
from support.grids import pairwise


@pytest.mark.parametrize("packing", [pack, pack_for_onednn, cpu_blocks.pack_blocks])
@pairwise({"rows": [0, 1, 5, 33], "width, columns": [(48, 64), (80, 34), (7, 33)], "bias": [False, True]})
def test_a_packed_weight_gives_what_the_plain_one_does(
    packing: object, rows: int, width: int, columns: int, bias: bool
) -> None:
    assert callable(packing)
    if packing is cpu_blocks.pack_blocks and not cpu_isa.fit(width, columns):
        return
    draw = torch.Generator().manual_seed(rows)
    x, weight = (
        torch.randn(rows, columns, generator=draw).bfloat16(),
        torch.randn(width, columns, generator=draw).bfloat16(),
    )
    added = torch.randn(width, generator=draw).bfloat16() if bias else None
    got = linear(x, packing(weight), added)
    assert got.dtype == torch.bfloat16 and got.shape == (rows, width)
    torch.testing.assert_close(got, F.linear(x, weight, added), rtol=0.02, atol=0.02)


def test_results_in_blocks_are_rounded_once() -> None:
    """Close to the exact product: within half a unit of the last place, plus what float32 loses in
    the sum.
    """
    x, weight, bias = (
        torch.randn(13, 512).bfloat16(),
        torch.randn(96, 512).bfloat16(),
        torch.randn(96).bfloat16(),
    )
    exact = F.linear(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(linear(x, pack(weight), bias).double(), exact, rtol=2**-8, atol=1e-4)


def test_a_row_in_blocks_does_not_depend_on_the_rows_beside_it() -> None:
    weight = pack(torch.randn(112, 66).bfloat16())
    wide = torch.randn(200, 80).bfloat16()
    x = wide[:, 3:69]  # strided rows, not aligned to vectors
    whole = linear(x, weight)
    for start, stop in [(0, count) for count in range(1, 14)] + [(5, 199), (100, 101)]:
        assert torch.equal(linear(x[start:stop], weight), whole[start:stop])
    assert torch.equal(linear(x.unflatten(0, (2, 100)), weight).flatten(0, 1), whole)
    assert torch.equal(linear(x.t().contiguous().t(), weight), whole)


def test_blocks_hold_pairs_of_the_inner_dim() -> None:
    weights = torch.arange(2 * 32 * 6).view(2, 32, 6).bfloat16()
    packed = cpu_blocks.pack_blocks(weights)
    assert packed.shape == (2, 2, 3, 16, 2) and packed.data_ptr() % 64 == 0
    assert torch.equal(packed[1, 1, 2, 5], weights[1, 16 + 5, 4:6])


def test_float32_is_held_in_blocks_where_the_cpu_multiplies_it(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, w13, w2 = torch.randn(32, 6), torch.randn(2, 64, 16), torch.randn(2, 16, 32)
    packed = pack(weight)
    assert packed.shape == (2, 6, 16, 1) and torch.equal(packed[1, 4, 5], weight[16 + 5, 4:5])
    assert [weights.shape for weights in pack_slots(w13, w2)] == [(2, 4, 16, 16, 1), (2, 1, 32, 16, 1)]
    assert pack(weight[:17]).dim() == 2 and pack(weight.double()).dim() == 2
    monkeypatch.setattr(cpu_isa, "features", lambda: frozenset({"neon"}))
    assert pack(weight) is weight and pack_slots(w13, w2) == (w13, w2)


def test_slots_are_held_once_in_blocks_where_they_fit() -> None:
    w13, w2 = torch.randn(3, 64, 16).bfloat16(), torch.randn(3, 16, 32).bfloat16()
    assert [weights.shape for weights in pack_slots(w13, w2)] == [(3, 4, 8, 16, 2), (3, 1, 16, 16, 2)]
    narrow = w13[:, :24], w2[:, :, :12]  # no blocks of 12 columns
    assert pack_slots(*narrow) == narrow


_COMPUTE = """
import torch
from lockstep.kernels.cpu import expert_blocks
from lockstep.kernels.cpu.codegen import blocks
from lockstep.kernels.cpu.linear import linear
x, one = torch.ones(1, 32).bfloat16(), torch.zeros(1, dtype=torch.int64)
linear(x, blocks.pack_blocks(torch.ones(16, 32).bfloat16()))
w13, w2 = torch.ones(1, 32, 32).bfloat16(), torch.ones(1, 32, 16).bfloat16()
expert_blocks.experts(x, one, one, blocks.pack_blocks(w13), blocks.pack_blocks(w2), one.clone())
"""


def test_a_second_process_compiles_nothing() -> None:
    exec(_COMPUTE, {})
    kernels = "(blocks.multiply_slots, expert_blocks.run_experts)"
    count = f"print([sum(kernel.stats.cache_misses.values()) for kernel in {kernels}])"
    command = [sys.executable, "-c", _COMPUTE + count]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.stdout.strip() == "[0, 0]", result.stderr
