"""Linear layers: packed or not, merged or not, they compute the same."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lockstep.kernels.reference.column import Reference
from lockstep.kernels.table import ops_of
from lockstep.parallel.linear import Backend, Linear, MergedLinear, SwiGLU

CPU = torch.device("cpu")
HIDDEN, WIDTH = 64, 48


def backend_of(dtype: torch.dtype) -> Backend[Reference]:
    return Backend(dtype, CPU, ops_of("cpu"))


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (0.2 * torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer_computes_with_its_weight_before_and_after_packing(
    dtype: torch.dtype, bias: bool
) -> None:
    layer = Linear(HIDDEN, WIDTH, backend_of(dtype), bias)
    layer.weight.copy_(draw(WIDTH, HIDDEN))
    if layer.bias is not None:
        layer.bias.copy_(draw(WIDTH))
    x = draw(5, HIDDEN, dtype=dtype)
    expected = F.linear(x, layer.weight.data.clone(), layer.bias)
    assert torch.equal(layer(x), expected)
    layer.pack()
    torch.testing.assert_close(layer(x), expected, rtol=0.02, atol=0.02)


def test_the_parts_of_a_merged_layer_are_views_by_their_names() -> None:
    layer = MergedLinear(HIDDEN, {"a": 3, "b": 5}, backend_of(torch.float32), bias=True, without_bias=("a",))
    views = layer.tensors()
    assert {name: tuple(view.shape) for name, view in views.items()} == {
        "a.weight": (3, HIDDEN),
        "b.weight": (5, HIDDEN),
        "b.bias": (5,),
    }
    for name, view in views.items():
        view.fill_(1.0 if name.startswith("a") else 2.0)
    y = layer(torch.ones(1, HIDDEN))
    assert y.tolist() == [[HIDDEN * 1.0] * 3 + [HIDDEN * 2.0 + 2.0] * 5], "the bias of a stays zero"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_a_swiglu_block_is_its_definition(dtype: torch.dtype, merged: bool, packed: bool) -> None:
    block = SwiGLU(HIDDEN, WIDTH, backend_of(dtype), merged)
    gate, up, down = draw(WIDTH, HIDDEN), draw(WIDTH, HIDDEN).flip(0), draw(HIDDEN, WIDTH)
    if merged:
        block.gate_up_proj.weight.copy_(torch.cat([gate, up]))
    else:
        block.gate_proj.weight.copy_(gate)
        block.up_proj.weight.copy_(up)
    block.down_proj.weight.copy_(down)
    if packed:
        block.pack()
    x = draw(5, HIDDEN, dtype=dtype)
    gate, up, down = (weight.to(dtype) for weight in (gate, up, down))
    separate = F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
    if not merged and not packed:
        assert torch.equal(block.swiglu(x), separate), "every step is rounded"
    torch.testing.assert_close(block.swiglu(x), separate, rtol=0.03, atol=0.03)
