"""The demo's routed experts in 4 bits, stored as compressed-tensors stores them."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from ....kernels.formats.four_bit_format import INT4, MXFP4, NVFP4, FourBitFormat
from ....kernels.reference.four_bit import quantise

FORMATS = {format.name: format for format in (INT4, MXFP4, NVFP4)}
_EXPERT = re.compile(r"(.*\.mlp\.experts\.\d+\.\w+)\.weight")
_STORED = {"int4": "pack-quantized", "mxfp4": "mxfp4-pack-quantized", "nvfp4": "nvfp4-pack-quantized"}


def in_four_bits(tensors: dict[str, Tensor], format: FourBitFormat) -> dict[str, Tensor]:
    """``tensors`` with the matrices of routed experts in ``format``; all others stay."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        matrix = _EXPERT.fullmatch(name)
        if matrix is None:
            found[name] = tensor
            continue
        w = quantise(tensor, format)
        codes, scales = w.codes, w.scales
        if format.name == "int4":
            codes = codes.contiguous().view(torch.int32)
            found[f"{matrix[1]}.weight_shape"] = torch.tensor(tensor.shape, dtype=torch.int32)
        elif format.name == "mxfp4":
            scales = scales.view(torch.uint8)
        found |= {f"{matrix[1]}.weight_packed": codes, f"{matrix[1]}.weight_scale": scales}
        if w.factors is not None:
            found[f"{matrix[1]}.weight_global_scale"] = 1 / w.factors
    return found


def quantisation_of(format: FourBitFormat) -> dict[str, Any]:
    """The ``quantization_config`` of a checkpoint in ``format``."""
    weights = {
        "num_bits": 4,
        "type": "int" if format.name == "int4" else "float",
        "strategy": "tensor_group" if format.has_factor else "group",
        "group_size": format.group,
        "symmetric": True,
        "dynamic": False,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": _STORED[format.name],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": [
            "lm_head",
            "re:.*self_attn.*",
            "re:.*shared_experts.*",
            r"re:.*mlp\.(gate|up|down)_proj.*",
            "re:.*eh_proj",
        ],
    }
