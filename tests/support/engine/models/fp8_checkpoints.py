"""Checkpoints as DeepSeek-V3, Kimi-K2 and Qwen3's FP8 releases ship them, made from random weights,
block by block.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoints import random_tensors, save_tensors

QUANTISATION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}
Block = tuple[int, int]
SCALES = "_scale_inv"


def quantised(
    tensors: dict[str, Tensor], scale_dtype: torch.dtype = torch.float32, size: Block = (128, 128)
) -> dict[str, Tensor]:
    """The matrices of linear layers in e4m3 with their scales beside them; embeddings, head and
    gates stay as they are.
    """
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if value.dim() != 2 or "embed_tokens" in name or "lm_head" in name or name.endswith(".gate.weight"):
            found[name] = value
            continue
        rows, columns = (-(-length // each) for length, each in zip(value.shape, size, strict=True))
        eight, scales = (
            torch.empty(value.shape, dtype=torch.float8_e4m3fn),
            torch.empty(rows, columns, dtype=scale_dtype),
        )
        for row in range(rows):
            for column in range(columns):
                block = (
                    slice(size[0] * row, size[0] * (row + 1)),
                    slice(size[1] * column, size[1] * (column + 1)),
                )
                scale = value[block].float().abs().max() / 448 * 1.01  # scales in bf16 are rounded
                if scale_dtype == torch.float8_e8m0fnu:
                    scale = scale.log2().ceil().exp2()
                scales[row, column] = scale
                eight[block] = (value[block].float() / scales[row, column].float()).to(torch.float8_e4m3fn)
        found |= {name: eight, name + SCALES: scales}
    return found


def dequantised(tensors: dict[str, Tensor], size: Block = (128, 128)) -> dict[str, Tensor]:
    """The same in float32, without scales."""
    found = {}
    for name, value in tensors.items():
        if name + SCALES in tensors:
            scales = (
                tensors[name + SCALES].float().repeat_interleave(size[0], 0).repeat_interleave(size[1], 1)
            )
            value = value.float() * scales[: value.shape[0], : value.shape[1]]
        if not name.endswith(SCALES):
            found[name] = value.float()
    return found


def write_pair(
    folder: Path,
    config: dict[str, Any],
    *,
    seed: int = 0,
    num_shards: int = 1,
    scale_dtype: torch.dtype = torch.float32,
    block: Block = (128, 128),
) -> tuple[Path, Path]:
    """The checkpoint ``fp8`` and the one it stands for in float32, ``plain``, in new directories of
    ``folder``.
    """
    eight = quantised(random_tensors(config, seed, torch.bfloat16), scale_dtype, block)
    fields = {
        "quantization_config": QUANTISATION | {"weight_block_size": list(block)},
        "torch_dtype": "bfloat16",
    }
    for name, tensors, added in (
        ("fp8", eight, fields),
        ("plain", dequantised(eight, block), {}),
    ):
        path = folder / name
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps(config | added))
        save_tensors(path, tensors, num_shards)
    return folder / "fp8", folder / "plain"


def write_whole_pair(folder: Path, config: dict[str, Any]) -> tuple[Path, Path]:
    """As ``write_pair``, with one scale per matrix: as Hy3-FP8 ships them, and for experts in one
    tensor as Mistral-Small-4 does. Static scales of activations stand beside them.
    """
    eight: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    for name, value in random_tensors(config, 0, torch.bfloat16).items():
        stacked = value.dim() == 3
        if not (stacked or (value.dim() == 2 and name.endswith("proj.weight"))):
            eight[name], plain[name] = value, value.float()
            continue
        scale = (value.float().abs().amax((-2, -1), keepdim=stacked) / 448 * 1.01).bfloat16()
        values = (value.float() / scale.float()).to(torch.float8_e4m3fn)
        eight[name], plain[name] = values, values.float() * scale.float()
        if stacked:
            eight |= {name + SCALES: scale, f"{name}_activation_scale": torch.ones(len(value))}
        else:
            owner = name.removesuffix("weight")
            eight |= {f"{owner}weight_scale": scale, f"{owner}input_scale": torch.ones(1)}
    stored = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
    for kind, tensors, added in (
        ("fp8", eight, {"quantization_config": stored, "torch_dtype": "bfloat16"}),
        ("plain", plain, {}),
    ):
        (folder / kind).mkdir(parents=True)
        (folder / kind / "config.json").write_text(json.dumps(config | added))
        save_tensors(folder / kind, tensors)
    return folder / "fp8", folder / "plain"
