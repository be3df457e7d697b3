"""Products of rows with one weight matrix per head, and the independence of rows."""

from __future__ import annotations

import pytest
import torch

from lockstep.kernels.cpu import head_products as products

# Rows, heads, inner and outer dims: whole tiles, no rows, and sizes left to torch.
SIZES = [(1, 3, 32, 64), (4, 2, 96, 128), (9, 5, 64, 192), (0, 2, 32, 64), (3, 2, 40, 64), (5, 2, 64, 24)]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_plain_and_transposed_weights(
    sizes: tuple[int, int, int, int], dtype: torch.dtype, tolerance: float
) -> None:
    num_rows, heads, inner, outer = sizes
    x, w = torch.randn(num_rows, heads, inner).to(dtype), torch.randn(heads, inner, outer).to(dtype)
    wider = torch.cat([w.transpose(1, 2), torch.full((heads, 7, inner), torch.nan).to(dtype)], 1)[
        :, :outer
    ]  # part of every head's rows
    expected = torch.einsum("rhi,hio->rho", x.double(), w.double())
    for run, weights in ((products.multiply_heads, w), (products.multiply_heads_turned, wider)):
        out = torch.full((num_rows, heads, outer + 5), 7.0).to(dtype)
        run(x, weights, out[..., :outer])
        torch.testing.assert_close(
            out[..., :outer].double(), expected, rtol=tolerance, atol=tolerance * inner**0.5
        )
        assert (out[..., outer:] == 7).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_those_beside_it(dtype: torch.dtype) -> None:
    x, w = torch.randn(11, 3, 64).to(dtype), torch.randn(3, 64, 64).to(dtype)
    for run in (products.multiply_heads, products.multiply_heads_turned):
        out, alone = torch.empty(11, 3, 64, dtype=dtype), torch.empty(1, 3, 64, dtype=dtype)
        run(x, w, out)
        for row in (0, 6, 10):
            run(x[row : row + 1], w, alone)
            assert torch.equal(out[row : row + 1], alone)
