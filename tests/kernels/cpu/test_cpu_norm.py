"""Compiled norms and SwiGLU products against their references, over odd shapes and strided
heads.
"""

from __future__ import annotations

import pytest
import torch

from lockstep.kernels.cpu import norm as cpu_norm
from lockstep.kernels.cpu.codegen.arrays import array
from lockstep.kernels.reference import norm

SHAPES = [(0, 32), (1, 33), (5, 2, 16), (600, 40)]  # the last is large enough to be shared among threads


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_as_the_reference(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    draw = torch.Generator().manual_seed(0)
    x, update = (torch.randn(shape, generator=draw).mul(20).to(dtype) for _ in range(2))
    weight = torch.randn(shape[-1], generator=draw).to(dtype)
    torch.testing.assert_close(
        cpu_norm.rms_norm(x, weight, 1e-6), norm.rms_norm(x, weight, 1e-6), rtol=tolerance, atol=tolerance
    )
    total, normed = cpu_norm.add_rms_norm(x, update, weight, 1e-6)
    expected_total, expected = norm.add_rms_norm(x, update, weight, 1e-6)
    assert torch.equal(total, expected_total)
    torch.testing.assert_close(normed, expected, rtol=tolerance, atol=tolerance)
    even = torch.cat([x, update], -1)
    torch.testing.assert_close(
        cpu_norm.silu_mul(even).float(), norm.silu_mul(even.float()), rtol=tolerance, atol=tolerance
    )


def test_heads_of_a_wider_row() -> None:
    heads = torch.randn(3, 6, 8).bfloat16()
    got = cpu_norm.rms_norm(heads[:, 1:4], torch.ones(8).bfloat16(), 1e-6)
    assert torch.equal(got, cpu_norm.rms_norm(heads[:, 1:4].contiguous(), torch.ones(8).bfloat16(), 1e-6))


def test_silu_at_the_ends() -> None:
    gate = torch.tensor([[-1e4, -90.0, 0.0, 90.0, 1e4]])
    got = cpu_norm.silu_mul(torch.cat([gate, torch.ones(1, 5)], -1))
    torch.testing.assert_close(got, torch.tensor([[0.0, 0.0, 0.0, 90.0, 1e4]]), rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [40, 1000])
def test_a_row_is_the_same_alone_and_among_many(dim: int, dtype: torch.dtype) -> None:
    """Equal to the bit: a few rows stay on one thread, many are shared out."""
    x, update = (
        torch.randn(600, dim, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in range(2)
    )
    weight = torch.randn(dim).to(dtype)
    normed, (total, added) = (
        cpu_norm.rms_norm(x, weight, 1e-6),
        cpu_norm.add_rms_norm(x, update, weight, 1e-6),
    )
    for rows in (slice(0, 1), slice(3, 8), slice(599, 600)):
        assert torch.equal(cpu_norm.rms_norm(x[rows], weight, 1e-6), normed[rows])
        own_total, own = cpu_norm.add_rms_norm(x[rows], update[rows], weight, 1e-6)
        assert torch.equal(own_total, total[rows]) and torch.equal(own, added[rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [32, 40, 64])
def test_bits_do_not_depend_on_addresses(dim: int, dtype: torch.dtype) -> None:
    """The output right behind the weights: compilers doubt that they are apart, and take another
    loop.
    """
    draw = torch.Generator().manual_seed(4)
    for _ in range(50):
        x, weight = torch.randn(1, dim, generator=draw).to(dtype), torch.randn(dim, generator=draw).to(dtype)
        room = torch.zeros(2 * dim, dtype=dtype)
        room[:dim] = weight
        near = array(room)
        cpu_norm.norm_rows(array(x)[:, None], near[:dim], 1e-6, near[dim:].reshape(1, 1, dim))
        assert torch.equal(room[dim:], cpu_norm.rms_norm(x, weight.clone(), 1e-6)[0])
