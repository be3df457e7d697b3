"""Linear layers with weights in the form that the processor reads fastest. Weights are packed once,
at load time.

``cpu_isa`` chooses the form: blocks (``codegen/blocks.py``), or oneDNN's own layout where oneDNN
uses matrix instructions. ``F.linear`` reorders plain bf16 weights on every call.
"""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import cpu_isa
from .codegen import blocks as cpu_blocks
from .codegen.arrays import array


def pack(weights: Tensor) -> Tensor:
    """Packs weights [N, D] for ``linear``: bf16 in blocks [N / 16, D / 2, 16, 2] or in oneDNN's
    layout; other dtypes unchanged.

    Only ``linear`` reads packed weights.
    """
    form = cpu_isa.weight_form(cpu_isa.here(), *weights.shape) if weights.dtype == torch.bfloat16 else "plain"
    if form == "blocks":
        return cpu_blocks.pack_blocks(weights)
    return pack_for_onednn(weights) if form == "onednn" else weights


def pack_for_onednn(weights: Tensor) -> Tensor:
    if weights.dtype != torch.bfloat16 or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return weights
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weights.detach())
    return packed


@dataclass(frozen=True)
class PackedSlots:
    """The weights of expert slots, twice: as loaded for products of few rows, and each packed for
    oneDNN for products of many.
    """

    plain_SND: Tensor
    packed: list[Tensor]


def pack_slots(w13_SFD: Tensor, w2_SDF: Tensor) -> tuple[Tensor, Tensor] | tuple[PackedSlots, PackedSlots]:
    """Packs the weights of expert slots, w13 [S, 2F, D] and w2 [S, D, F], for ``experts``. Returns
    both in blocks, [S, 2F / 16, D / 2, 16, 2] and [S, D / 16, F / 2, 16, 2]; or both as
    ``PackedSlots``; or the tensors themselves if packing changes nothing.
    """
    form = (
        cpu_isa.slot_form(cpu_isa.here(), *w2_SDF.shape[1:]) if w13_SFD.dtype == torch.bfloat16 else "plain"
    )
    if form == "blocks":
        return cpu_blocks.pack_blocks(w13_SFD), cpu_blocks.pack_blocks(w2_SDF)
    return pack_slots_for_onednn(w13_SFD, w2_SDF) if form == "onednn" else (w13_SFD, w2_SDF)


def pack_slots_for_onednn(
    w13_SFD: Tensor, w2_SDF: Tensor
) -> tuple[Tensor, Tensor] | tuple[PackedSlots, PackedSlots]:
    packed = [[pack_for_onednn(slot) for slot in weights] for weights in (w13_SFD, w2_SDF)]
    if not all(slot.is_mkldnn for slots in packed for slot in slots):
        return w13_SFD, w2_SDF
    return PackedSlots(w13_SFD, packed[0]), PackedSlots(w2_SDF, packed[1])


def repack_slot(weights: Tensor | PackedSlots, slot: int) -> None:
    """Brings the packed form of ``slot`` up to date, whose loaded form has changed. Blocks are the
    only form that there is.
    """
    if isinstance(weights, PackedSlots):
        weights.packed[slot] = pack_for_onednn(weights.plain_SND[slot])


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
    num_inner = x.shape[-1]
    assert x.dtype == torch.bfloat16 and num_inner == 2 * weight.shape[1], (
        f"x {x.dtype} {tuple(x.shape)}, weight {tuple(weight.shape)}"
    )
    y = x.new_empty((*x.shape[:-1], weight.shape[0] * cpu_isa.COLUMNS))
    x_TD = x.reshape(-1, num_inner)
    if x_TD.stride(1) != 1:
        x_TD = x_TD.contiguous()
    bias = np.empty(0, np.uint16) if bias_N is None else array(bias_N)
    y_TN = array(y.view(-1, y.shape[-1]))
    cpu_blocks.multiply_rows(
        x_TD.data_ptr(), 2 * x_TD.stride(0), weight.data_ptr(), num_inner, bias, y_TN, numba.get_num_threads()
    )
    return y
