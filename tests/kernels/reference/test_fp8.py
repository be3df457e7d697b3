"""Block-scaled FP8: the precision of quantising, and the references built on it."""

from __future__ import annotations

import pytest
import torch

from lockstep.kernels.reference import fp8
from lockstep.kernels.reference.experts import experts_reference
from lockstep.kernels.reference.norm import add_rms_norm, rms_norm, silu_mul

# Half a step of e4m3: relative to the value (three bits of mantissa), and, for its smallest
# numbers, relative to the largest.
STEP, SMALLEST = 2.0**-4, 2.0**-10 / 448


@pytest.mark.parametrize("shape", [(3, 128), (5, 300), (2, 1), (0, 256)])
def test_rows_come_back_within_half_a_step(shape: tuple[int, int]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, shape[1])
    q = fp8.quantise_rows(x)
    assert (
        q.values.dtype == torch.float8_e4m3fn
        and q.values.shape == shape
        and q.scales.shape == (shape[0], -(-shape[1] // 128))
    )
    error = (fp8.widen_rows(q) - x).abs()
    largest = q.scales.repeat_interleave(128, 1)[:, : shape[1]] * fp8.LARGEST
    assert (error <= x.abs() * STEP * 1.001 + largest * SMALLEST).all()


def test_zeros_stay_zeros() -> None:
    q = fp8.quantise_rows(torch.zeros(2, 200))
    assert not fp8.widen_rows(q).any() and q.scales.isfinite().all()


@pytest.mark.parametrize("shape", [(2, 128, 256), (3, 130, 70), (4, 5)])
def test_blocks_come_back_and_have_scales_of_their_own(shape: tuple[int, ...]) -> None:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    w[..., :128, :128] *= 1000
    q = fp8.quantise_blocks(w)
    assert q.scales.shape == (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))
    torch.testing.assert_close(fp8.widen_blocks(q), w, rtol=STEP, atol=5000 * SMALLEST)


def test_gate_and_up_rows_do_not_share_a_scale() -> None:
    w13 = torch.ones(2, 2 * 70, 130)
    w13[:, 70:] = 1000.0
    q = fp8.quantise_w13(w13)
    assert q.scales.shape == (2, 2, 1, 2)
    torch.testing.assert_close(fp8.widen_blocks(q), w13, rtol=1e-6, atol=0)


def test_norms_and_product_are_those_without_quantising() -> None:
    x, update = torch.randn(4, 200), torch.randn(4, 200)
    weight = torch.rand(200) + 0.5
    torch.testing.assert_close(
        fp8.widen_rows(fp8.rms_norm_fp8(x, weight, 1e-6)), rms_norm(x, weight, 1e-6), rtol=STEP, atol=1e-2
    )
    total, q = fp8.add_rms_norm_fp8(x, update, weight, 1e-6)
    expected = add_rms_norm(x, update, weight, 1e-6)
    assert torch.equal(total, expected[0])
    torch.testing.assert_close(fp8.widen_rows(q), expected[1], rtol=STEP, atol=1e-2)
    torch.testing.assert_close(fp8.widen_rows(fp8.silu_mul_fp8(x)), silu_mul(x), rtol=STEP, atol=1e-2)


def test_experts_lose_little_against_full_precision() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(5, 256, generator=generator)
    w13, w2 = (
        torch.randn(3, 2 * 192, 256, generator=generator) / 16,
        torch.randn(3, 256, 192, generator=generator) / 14,
    )
    rows, slots = torch.tensor([0, 1, 2, 3, 4, 0]), torch.tensor([2, 0, -1, 0, 2, 0])
    counts = torch.zeros(2, 3, dtype=torch.int64)
    y = fp8.experts_fp8(
        fp8.quantise_rows(x),
        (rows, slots),
        fp8.quantise_w13(w13),
        fp8.quantise_blocks(w2),
        counts[0],
        torch.float32,
    )
    expected = experts_reference(x, rows, slots, w13, w2, counts[1])
    assert torch.equal(counts[0], counts[1]) and not y[2].any()
    error = (y - expected).norm() / expected.norm()
    assert 0.001 < error < 0.08
