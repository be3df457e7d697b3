"""DeepGEMM behind the op table, by a double that asserts what the library reads and computes the
reference.
"""

from __future__ import annotations

import functools
import logging

import pytest
import torch
from torch import Tensor

from lockstep.kernels.libraries.deep_gemm import DeepGemm
from lockstep.kernels.reference.fp8 import Quantised, quantise_blocks, widen_blocks, widen_rows
from lockstep.kernels.reference.sublayers import Projection, RowNorm
from lockstep.kernels.table import ops_of
from lockstep.kernels.triton import linear_fp8
from lockstep.kernels.triton.column import Triton

BF16 = torch.bfloat16
ROWS = linear_fp8.QUANTISED_HERE + 1
Pair = tuple[Tensor, Tensor]


class Double:
    """``deep_gemm`` on an H100: FP8 with scales in float32, one per row and per block."""

    def __init__(self) -> None:
        self.calls = 0

    def fp8_gemm_nt(self, a: Pair, b: Pair, d: Tensor) -> None:
        (x, x_scales), (w, w_scales) = a, b
        (rows, dim), columns = x.shape, len(w)
        assert x.dtype == w.dtype == torch.float8_e4m3fn and d.dtype == BF16
        assert x_scales.dtype == w_scales.dtype == torch.float32
        assert x.stride() == w.stride() == (dim, 1) and d.stride() == (columns, 1)
        assert w.shape == (columns, dim) and d.shape == (rows, columns)
        assert dim % 128 == 0 and columns % 8 == 0, "rows of 16 bytes"
        assert x_scales.shape == (rows, dim // 128) and x_scales.is_contiguous()
        assert w_scales.shape == (-(-columns // 128), dim // 128) and w_scales.is_contiguous()
        assert not any(tensor.data_ptr() % 16 for tensor in (x, w, d))
        d.copy_(widen_rows(Quantised(*a)) @ widen_blocks(Quantised(*b)).T)
        self.calls += 1


def projection_of(columns: int, dim: int, bias: bool) -> Projection:
    generator = torch.Generator().manual_seed(1)
    weight = quantise_blocks(torch.randn(columns, dim, generator=generator) * dim**-0.5)
    return Projection(weight.values, torch.randn(columns).to(BF16) if bias else None, weight.scales)


def ops_with(double: Double, arch: int = 90) -> Triton:
    ops = ops_of("triton")
    assert isinstance(ops, Triton)
    return ops.with_product(functools.partial(DeepGemm, double, arch))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the double computes on a CPU")
@pytest.mark.parametrize("bias", [False, True])
def test_many_rows_are_the_librarys(bias: bool) -> None:
    double, projection = Double(), projection_of(200, 256, bias)
    ops, reference = ops_with(double), ops_of("reference")
    x = torch.randn(ROWS, 256, generator=torch.Generator().manual_seed(2)).to(BF16)
    wide = torch.nn.functional.pad(x, (0, 40))[:, :256]  # columns of a wider matrix
    torch.testing.assert_close(
        ops.project(wide, projection).float(), reference.project(x, projection).float(), rtol=0.02, atol=0.05
    )
    norm = RowNorm(torch.ones(256).to(BF16), 1e-6)
    _, y = ops.norm_project((x, None), norm, projection)
    _, wanted = reference.norm_project((x, None), norm, projection)
    torch.testing.assert_close(y.float(), wanted.float(), rtol=0.05, atol=0.1)
    assert double.calls == 2
    ops.project(x[:3], projection)
    assert double.calls == 2, "few rows are quantised by our own product"
    ops_of("triton").project(x, projection)
    assert double.calls == 2, "the table itself has not changed"


@pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted")
def test_other_shapes_are_our_own_and_it_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    double, x = Double(), torch.randn(ROWS, 300).to(BF16)
    ops, odd = ops_with(double), projection_of(48, 300, False)
    with caplog.at_level(logging.WARNING):
        y = ops.project(x, odd)
        ops.project(x, odd)
    assert torch.equal(y, ops_of("triton").project(x, odd)) and not double.calls
    assert caplog.text.count("our own kernel for a matrix 48 x 300") == 1


def test_reasons() -> None:
    product = DeepGemm(Double(), 90, linear_fp8.product)
    assert not product.supports((7168, 2048), 90, BF16)
    assert "sm_100" in product.supports((7168, 2048), 100, BF16)
    assert "float16" in product.supports((7168, 2048), 90, torch.float16)
    assert "7168 x 2000" in product.supports((7168, 2000), 90, BF16)
    assert "12 x 128" in product.supports((12, 128), 90, BF16)
