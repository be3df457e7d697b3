from __future__ import annotations

import pytest
import torch

from lockstep.kernels.reference.norm import rms_norm


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape", [(5, 32), (3, 2, 32), (0, 32)])
def test_equals_the_definition(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    x, weight = (torch.randn(shape) * 30).to(dtype), torch.randn(32).to(dtype)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 0.5).sqrt() * weight.double()
    got = rms_norm(x, weight, 0.5)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)
