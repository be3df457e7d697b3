"""The Triton norms and the SwiGLU product against the reference."""

from __future__ import annotations

import pytest
import torch

from lockstep.kernels.reference import norm as reference
from lockstep.kernels.triton import norm as triton_norm
from support.kernels.poison import DEVICE, poisoned

DTYPES = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1.6e-2)]
)
SHAPES = [(5, 32), (3, 2, 32), (1, 7168), (70, 3, 20), (9, 1), (0, 32), (0, 2, 32), (33, 1000)]


@DTYPES
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=generator) * 30).to(DEVICE, dtype)
    weight = torch.randn(shape[-1], generator=generator).to(DEVICE, dtype)
    with poisoned():
        got = triton_norm.rms_norm(x, weight, 0.5)
    assert got.dtype == dtype
    torch.testing.assert_close(got, reference.rms_norm(x, weight, 0.5), rtol=tolerance, atol=tolerance)


def test_rms_norm_of_heads_inside_a_wider_matrix() -> None:
    merged = torch.randn(7, 10, 16, device=DEVICE)
    weight = torch.rand(16, device=DEVICE)
    for heads in (merged[:, :6], merged[:, 6:8], merged.transpose(1, 2).contiguous().transpose(1, 2)):
        torch.testing.assert_close(
            triton_norm.rms_norm(heads, weight, 1e-6), reference.rms_norm(heads, weight, 1e-6)
        )
    for rows in (merged[:, 3], merged.view(7, 160)[:, 16:32]):
        torch.testing.assert_close(
            triton_norm.rms_norm(rows, weight, 1e-6), reference.rms_norm(rows, weight, 1e-6)
        )


@DTYPES
@pytest.mark.parametrize("shape", SHAPES)
def test_add_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(1)
    x, update = ((torch.randn(shape, generator=generator) * 3).to(DEVICE, dtype) for _ in range(2))
    weight = torch.randn(shape[-1], generator=generator).to(DEVICE, dtype)
    before = x.clone()
    with poisoned():
        got = triton_norm.add_rms_norm(x, update, weight, 1e-6)
    torch.testing.assert_close(
        got, reference.add_rms_norm(x, update, weight, 1e-6), rtol=tolerance, atol=tolerance
    )
    assert torch.equal(x, before)


@DTYPES
@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 10), (0, 8), (1, 2 * 2500)])
def test_silu_mul(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(DEVICE, dtype)
    with poisoned():
        got = triton_norm.silu_mul(x)
    torch.testing.assert_close(got, reference.silu_mul(x), rtol=tolerance, atol=tolerance)


def test_silu_mul_of_strided_rows() -> None:
    x = torch.randn(4, 40, device=DEVICE)[:, 4:24]
    torch.testing.assert_close(triton_norm.silu_mul(x), reference.silu_mul(x))
