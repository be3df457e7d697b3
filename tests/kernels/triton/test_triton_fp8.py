"""FP8 in Triton: quantised rows, and experts on them, against the references."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from triton.runtime import interpreter

from lockstep.engine.models.decoder import DenseMLP
from lockstep.kernels.reference import fp8 as reference
from lockstep.kernels.reference.fp8 import Quantised, quantise_blocks, quantise_rows, quantise_w13, widen_rows
from lockstep.kernels.reference.sublayers import Projection, RowNorm
from lockstep.kernels.table import ops_of
from lockstep.kernels.triton import fp8 as triton_fp8, norm as triton_norm
from lockstep.kernels.triton.experts_fp8 import experts_fp8, experts_fp8_tiled
from lockstep.kernels.triton.linear_fp8 import QUANTISED_HERE, linear_fp8
from lockstep.kernels.triton.tiles import ExpertTile, ProductTile
from lockstep.moe.config import MoEConfig
from lockstep.moe.layer import SharedExperts
from lockstep.parallel.dense import split_as_attention
from lockstep.parallel.linear import Backend
from lockstep.parallel.tensor import UNSPLIT
from support.grids import pairwise
from support.kernels.poison import DEVICE, poisoned

# Two roundings of nearly equal numbers may differ by a step of e4m3: 2^-3 of the number, or 2^-9
# among the smallest.
STEP = 2.0**-3


def assert_same(got: Quantised, expected: Quantised) -> None:
    assert got.values.dtype == torch.float8_e4m3fn and got.values.shape == expected.values.shape
    torch.testing.assert_close(got.scales, expected.scales, rtol=1e-5, atol=0)
    groups = expected.scales.repeat_interleave(128, 1)[:, : expected.values.shape[1]]
    assert (
        got.values.view(torch.uint8) != expected.values.view(torch.uint8)
    ).float().mean().nan_to_num() < 0.01
    error = (widen_rows(got) - widen_rows(expected)).abs()
    assert (error <= (widen_rows(expected).abs() * STEP + groups * 2.0**-9) * 1.001).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 128), (5, 300), (2, 1), (0, 256), (2, 7168)])
def test_rows_and_norms(shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, update = ((torch.randn(shape, generator=generator) * 3).to(DEVICE, dtype) for _ in range(2))
    weight = torch.randn(shape[1], generator=generator).to(DEVICE, dtype)
    with poisoned():
        rows, plain = triton_fp8.quantise_rows(x), triton_fp8.rms_norm_fp8(x, weight, 1e-6)
        total, normed = triton_fp8.add_rms_norm_fp8(x, update, weight, 1e-6)
        own = [triton_norm.rms_norm(part, weight, 1e-6) for part in (x, total)]
    assert_same(rows, reference.quantise_rows(x))
    # The interpreter truncates sums and norms to bf16, which are those of the other op.
    torch.testing.assert_close(total, x + update, rtol=1.6e-2, atol=1e-2)
    assert_same(plain, reference.quantise_rows(own[0]))
    assert_same(normed, reference.quantise_rows(own[1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 128), (3, 300), (33, 256), (2, 7168)])
def test_a_fused_norm_has_the_bits_of_norm_and_quantisation(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(3)
    x, update = ((torch.randn(shape, generator=generator) * 3).to(DEVICE, dtype) for _ in range(2))
    weight = torch.randn(shape[1], generator=generator).to(DEVICE, dtype)
    with poisoned():
        fused_total, fused = triton_fp8.add_rms_norm_fp8(x, update, weight, 1e-6)
        total, normed = triton_norm.add_rms_norm(x, update, weight, 1e-6)
        rows = triton_fp8.quantise_rows(normed)
        alone = triton_fp8.rms_norm_fp8(total, weight, 1e-6)
        both_total, both = triton_fp8.norm_rows(x, update, weight, 1e-6)
    assert torch.equal(fused_total, total) and torch.equal(both_total, total)
    assert torch.equal(both.wide, normed)
    for found in (fused, alone, both.eight):
        assert torch.equal(found.scales, rows.scales)
        assert torch.equal(found.values.view(torch.uint8), rows.values.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 256), (2, 600), (1, 2 * 1300), (0, 256)])
def test_silu_mul(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    with poisoned():
        h = triton_fp8.silu_mul_fp8(x)
    assert_same(h, reference.silu_mul_fp8(x))


def test_zeros_stay_zeros() -> None:
    q = triton_fp8.quantise_rows(torch.zeros(2, 200, device=DEVICE))
    assert not widen_rows(q).any() and q.scales.isfinite().all()


def powers(generator: torch.Generator, *shape: int, rows: int = 128) -> torch.Tensor:
    """Factors of 1/4 to 4, one for each block of 128 in the last two dims, so that all scales
    differ.
    """
    blocks = torch.randint(
        -2, 3, (*shape[:-2], -(-shape[-2] // rows), -(-shape[-1] // 128)), generator=generator
    )
    return (2.0**blocks).repeat_interleave(rows, -2).repeat_interleave(128, -1)[..., : shape[-2], : shape[-1]]


CASES = {
    "spread": [3, 0, 1, 3, 2, 2, 0, 3],
    "one slot, more than a block": [1] * 70,
    "padding": [-1, 2, -1, 0, 0, -1, 3, -1],
    "only padding": [-1] * 8,
    "none": [],
}


# Columns of both products. If narrower than a group, the second product quantises the activation.
@pairwise(
    {
        "case": CASES,
        "hidden, width": [(128, 128), (256, 200), (144, 40)],
        "columns": [(128, 128), (32, 64)],
        "dtype": [torch.float32, torch.bfloat16],
    }
)
def test_experts(case: str, hidden: int, width: int, dtype: torch.dtype, columns: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(2)
    slots = torch.tensor(CASES[case], dtype=torch.int64, device=DEVICE)
    rows = torch.randint(0, 5, (len(slots),), generator=generator).to(DEVICE)
    x = quantise_rows(
        (torch.randn(5, hidden, generator=generator) * powers(generator, 5, hidden, rows=1)).to(DEVICE)
    )
    w13_SFD = torch.randn(4, 2 * width, hidden, generator=generator) * hidden**-0.5
    w13_SFD.unflatten(1, (2, -1)).mul_(powers(generator, 4, 2, width, hidden))
    w13 = quantise_w13(w13_SFD.to(DEVICE))
    w2_SDF = (
        torch.randn(4, hidden, width, generator=generator) * width**-0.5 * powers(generator, 4, hidden, width)
    )
    w2 = quantise_blocks(w2_SDF.to(DEVICE))
    counts, expected_counts = (torch.ones(4, dtype=torch.int64, device=DEVICE) for _ in range(2))
    tile = ExpertTile(0, 16, ProductTile(columns[0], 128, 4, 2), ProductTile(columns[1], 128, 4, 2))
    with poisoned():
        y = experts_fp8_tiled(x, (rows, slots), (w13, w2), counts, dtype, tile)
    expected = reference.experts_fp8(x, (rows, slots), w13, w2, expected_counts, dtype)
    assert y.dtype == dtype and torch.equal(counts, expected_counts)
    y, expected = y[slots >= 0], expected[slots >= 0]
    error = (y.float() - expected.float()).norm(dim=-1) / expected.float().norm(dim=-1).clamp_min(1e-6)
    assert (error < 0.01).all()


@pairwise(
    {
        "rows": [1, 16, 17, 65, 130],
        "dim, columns": [(128, 128), (256, 200), (144, 40)],
        "dtype": [torch.float32, torch.bfloat16],
        "bias": [False, True],
    }
)
def test_linear_layers(rows: int, dim: int, columns: int, dtype: torch.dtype, bias: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    # Columns of a wider matrix, as of a merged projection.
    x = torch.randn(rows, dim + 8, generator=generator).to(DEVICE, dtype)[:, :dim]
    x *= powers(generator, rows, dim, rows=1).to(DEVICE, dtype)
    w = torch.randn(columns, dim, generator=generator) * dim**-0.5 * powers(generator, columns, dim)
    weight = quantise_blocks(w.to(DEVICE))
    bias_N = torch.randn(columns, generator=generator).to(DEVICE, dtype) if bias else None
    with poisoned():
        y = linear_fp8(x, weight.values, bias_N, weight.scales)
    expected = reference.linear_fp8(x, weight.values, bias_N, weight.scales)
    assert y.dtype == dtype and y.shape == (rows, columns)
    error = (y.float() - expected.float()).norm(dim=-1) / expected.float().norm(dim=-1)
    assert (error < 0.01).all()
    assert torch.equal(y[:1], linear_fp8(x[:1], weight.values, bias_N, weight.scales)) or rows > 16


@pytest.mark.parametrize("rows", [3, QUANTISED_HERE + 1])
@pytest.mark.parametrize("summed", [False, True])
def test_a_norm_before_a_linear_layer(rows: int, summed: bool) -> None:
    """Many rows are quantised as their norm is computed; few by the product."""
    generator = torch.Generator().manual_seed(rows)
    x, update = ((torch.randn(rows, 400, generator=generator) * 3).to(DEVICE)[:, :300] for _ in range(2))
    weight = quantise_blocks(torch.randn(48, 300, generator=generator).to(DEVICE))
    projection = Projection(weight.values, torch.randn(48, generator=generator).to(DEVICE), weight.scales)
    norm = RowNorm(torch.randn(300, generator=generator).to(DEVICE), 1e-6)
    residual = (x, update if summed else None)
    with poisoned(), launched() as names:
        total, y = ops_of("triton").norm_project(residual, norm, projection)
    wanted_total, wanted = ops_of("reference").norm_project(residual, norm, projection)
    torch.testing.assert_close(total, wanted_total)
    torch.testing.assert_close(y, wanted, rtol=0.02, atol=0.02 * float(wanted.abs().max()))
    many = ["_quantise_kernel", "_linear_fp8_kernel"]
    assert names == many if rows > QUANTISED_HERE else names[-1] == many[-1] and many[0] not in names


@pytest.mark.parametrize("rows", [3, QUANTISED_HERE + 1])
def test_a_dense_block_in_fp8_has_the_bits_of_its_parts(rows: int) -> None:
    ops, splits = ops_of("triton"), split_as_attention(UNSPLIT)
    backend = Backend(torch.bfloat16, torch.device(DEVICE), ops, splits, fp8_block=128)
    generator = torch.Generator().manual_seed(rows)
    norm = RowNorm(torch.randn(256, generator=generator).to(DEVICE, torch.bfloat16), 1e-6)
    block = DenseMLP(256, 128, backend, norm)
    for linear in (block.gate_up_proj, block.down_proj):
        weight = quantise_blocks(torch.randn(linear.weight.shape, generator=generator).to(DEVICE))
        linear.weight.copy_(weight.values)
        linear.scales.copy_(weight.scales)
    block.pack()
    x, update = (torch.randn(rows, 256, generator=generator).to(DEVICE, torch.bfloat16) for _ in range(2))
    total, y = block((x, update))
    wanted_total, normed = ops.add_norm((x, update), norm)
    assert torch.equal(total, wanted_total) and torch.equal(y, block.swiglu(normed))


@pytest.mark.parametrize("rows", [3, QUANTISED_HERE + 1])
def test_shared_experts_take_the_norm_that_experts_quantised(rows: int) -> None:
    """The same bits; many rows are not quantised again."""
    ops, generator = ops_of("triton"), torch.Generator().manual_seed(rows)
    backend = Backend(torch.bfloat16, torch.device(DEVICE), ops, split_as_attention(UNSPLIT), fp8_block=128)
    config = MoEConfig(hidden=256, expert_width=64, num_experts=4, top_k=2, shared_width=128)
    block = SharedExperts(config, backend)
    for linear in (block.gate_up_proj, block.down_proj):
        weight = quantise_blocks(torch.randn(linear.weight.shape, generator=generator).to(DEVICE))
        linear.weight.copy_(weight.values)
        linear.scales.copy_(weight.scales)
    block.pack()
    norm = RowNorm(torch.randn(256, generator=generator).to(DEVICE, torch.bfloat16), 1e-6)
    x = torch.randn(rows, 256, generator=generator).to(DEVICE, torch.bfloat16)
    _, normed = ops.norm_rows((x, None), norm)
    with launched() as names:
        y = block(normed)
    assert names.count("_quantise_kernel") == (1 if rows > QUANTISED_HERE else 0), "of the last product alone"
    assert torch.equal(y, block.swiglu(normed.wide)) and torch.equal(y, block(normed.wide))


@contextmanager
def launched() -> Iterator[list[str]]:
    """The names of the kernels that are launched meanwhile."""
    names: list[str] = []
    run = interpreter.InterpretedFunction.run

    def note(kernel: Any, *args: Any, **named: Any) -> Any:
        names.append(kernel.fn.__name__)
        return run(kernel, *args, **named)

    with mock.patch.object(interpreter.InterpretedFunction, "run", note):
        yield names


def test_experts_read_rows_that_are_views() -> None:
    """Tokens that came from other ranks lie between their scales and places."""
    generator = torch.Generator().manual_seed(4)
    x = quantise_rows(torch.randn(6, 256, generator=generator).to(DEVICE))
    w13 = quantise_w13(torch.randn(2, 128, 256, generator=generator).to(DEVICE))
    w2 = quantise_blocks(torch.randn(2, 256, 64, generator=generator).to(DEVICE))
    pairs = torch.tensor([5, 0, 3], device=DEVICE), torch.tensor([1, 0, 1], device=DEVICE)
    apart = torch.zeros(6, 336, dtype=torch.uint8, device=DEVICE)
    apart[:, :256], apart[:, 256:264] = x.values.view(torch.uint8), x.scales.view(torch.uint8)
    views = Quantised(apart[:, :256].view(torch.float8_e4m3fn), apart[:, 256:264].view(torch.float32))
    found = []
    for rows in (x, views):
        counts = torch.zeros(2, dtype=torch.int64, device=DEVICE)
        with poisoned():
            found.append(experts_fp8(rows, pairs, w13, w2, counts, torch.float32))
    assert torch.equal(*found) and found[0].any()


def test_no_rows() -> None:
    weight = quantise_blocks(torch.ones(128, 128, device=DEVICE))
    x = torch.empty(0, 128, device=DEVICE)
    assert linear_fp8(x, weight.values, None, weight.scales).shape == (0, 128)


def test_every_number_is_rounded_to_the_nearest_and_ties_to_even() -> None:
    x = torch.cat(
        [torch.linspace(0, 0.03, 1000), torch.linspace(0.03, 448, 5000), torch.tensor([448.0])]
    ).repeat(2)
    x[: len(x) // 2].neg_()
    for part in x.split(127):
        row = torch.cat([torch.tensor([448.0]), part])[None].to(DEVICE)
        assert torch.equal(triton_fp8.quantise_rows(row).values.float(), row.to(torch.float8_e4m3fn).float())
