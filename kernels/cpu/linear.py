"""Linear layers with weights in the form that the processor reads fastest. Weights are packed once,
at load time.

``cpu_isa`` chooses the form: blocks (``codegen/blocks.py``), or oneDNN's own layout for what has no
whole blocks. ``F.linear`` reorders plain bf16 weights on every call, and for float32
takes MKL, whose kernels on AMD's CPUs are slow for few rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from .. import cpu_isa
from .codegen import blocks as cpu_blocks
from .codegen.arrays import array, made
from .codegen.crew import num_threads

NO_PLACES: NDArray[np.int64] = np.empty(0, np.int64)
_NO_BIAS = {torch.bfloat16: np.empty((0, 0), np.uint16), torch.float32: np.empty((0, 0), np.float32)}


def pack(weights: Tensor) -> Tensor:
    """Packs weights [N, D] for ``linear``: in blocks [N / 16, U, 16, D / U] of units of bf16 or
    float32, or bf16 in oneDNN's layout; others unchanged.

    Only ``linear`` reads packed weights.
    """
    num_columns, num_inner = weights.shape
    form: cpu_isa.Form = "plain"
    if weights.dtype == torch.bfloat16:
        form = cpu_isa.weight_form(cpu_isa.here(), num_columns, num_inner)
    elif weights.dtype == torch.float32:
        form = cpu_isa.float_form((num_columns, num_inner))
    if form == "blocks":
        return cpu_blocks.pack_blocks(weights)
    return pack_for_onednn(weights) if form == "onednn" else weights


def pack_for_onednn(weights: Tensor) -> Tensor:
    if weights.dtype != torch.bfloat16 or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return weights
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weights.detach())
    return packed


def pack_slots(w13_SFD: Tensor, w2_SDF: Tensor) -> tuple[Tensor, Tensor]:
    """Packs the weights of expert slots, w13 [S, 2F, D] and w2 [S, D, F], for ``experts``. Returns
    both in blocks, [S, 2F / 16, U, 16, D / U] and [S, D / 16, U, 16, F / U], or unchanged.
    """
    _, hidden, width = w2_SDF.shape
    form: cpu_isa.Form = "plain"
    if w13_SFD.dtype == torch.bfloat16:
        form = cpu_isa.slot_form(hidden, width)
    elif w13_SFD.dtype == torch.float32:
        form = cpu_isa.float_form((2 * width, hidden), (hidden, width))
    return (
        (cpu_blocks.pack_blocks(w13_SFD), cpu_blocks.pack_blocks(w2_SDF))
        if form == "blocks"
        else (w13_SFD, w2_SDF)
    )


def linear(x: Tensor, weight_ND: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """x W^T + b over the last dim of x [..., D]; the weight may be packed. A row's result does not
    depend on its neighbours.
    """
    if weight_ND.dim() == 4:
        return _linear_in_blocks(x, weight_ND, bias_N)
    if not weight_ND.is_mkldnn:
        return F.linear(x, weight_ND, bias_N)
    y: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight_ND, bias_N, "none", [], "")
    return y


def _linear_in_blocks(x: Tensor, weight: Tensor, bias_N: Tensor | None) -> Tensor:
    x_TD = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if x_TD.stride(1) != 1:
        x_TD = x_TD.contiguous()
    num_rows = x_TD.shape[0]
    y_TN, y = made((num_rows, cpu_isa.COLUMNS * weight.shape[0]), x.dtype)
    bias_SN = None if bias_N is None else bias_N.view(1, -1)
    multiply_into(y, x_TD, weight, bias_SN, (NO_PLACES, NO_PLACES, np.array([num_rows])))
    return y_TN if x.dim() == 2 else y_TN.view(*x.shape[:-1], y.shape[1])


def multiply_into(
    y_MN: NDArray[Any],
    x_TD: Tensor,
    weight: Tensor,
    bias_SN: Tensor | None,
    pairs: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]],
) -> None:
    """``blocks.multiply_slots`` of tensors; a weight without slots has one."""
    num_units, _, per_unit = weight.shape[-3:]
    assert x_TD.dtype == weight.dtype and x_TD.shape[1] == num_units * per_unit, (
        f"x {x_TD.dtype} {tuple(x_TD.shape)}, weight {weight.dtype} {tuple(weight.shape)}"
    )
    cpu_blocks.multiply_slots(
        x_TD.data_ptr(),
        x_TD.itemsize * x_TD.stride(0),
        weight.data_ptr(),
        num_units,
        pairs,
        _NO_BIAS[x_TD.dtype] if bias_SN is None else array(bias_SN),
        y_MN,
        num_threads(),
    )
