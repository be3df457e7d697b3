"""Checkpoints with routed experts in 4 bits, as their makers write them. Codes and scales are drawn
at random; their values are worked out here a second time, code by code.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .checkpoints import random_tensors, save_tensors

_KEPT = ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|down)_proj.*"]


def _compressed(format: str, **weights: Any) -> dict[str, Any]:
    weights = {"num_bits": 4, "symmetric": True, "dynamic": False, "actorder": None} | weights
    group = {"input_activations": None, "targets": ["Linear"], "weights": weights}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": group},
        "ignore": _KEPT,
    }


CONFIGS: dict[str, dict[str, Any]] = {
    "int4": _compressed("pack-quantized", type="int", strategy="group", group_size=32),
    "nvfp4": _compressed("nvfp4-pack-quantized", type="float", strategy="tensor_group", group_size=16),
    "nvfp4 of Model Optimizer": {
        "quant_method": "modelopt",
        "quant_algo": "NVFP4",
        "ignore": [
            "lm_head",
            "*self_attn*",
            "*shared_experts*",
            "*.mlp.gate_proj",
            "*.mlp.up_proj",
            "*.mlp.down_proj",
        ],
    },
    "mxfp4": _compressed("mxfp4-pack-quantized", type="float", strategy="group", group_size=32),
    "mxfp4 of gpt-oss": {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.embed_tokens", "lm_head"],
    },
}

_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_MATRIX = re.compile(r"(.*\.experts\.)(\d+)\.(\w+)\.weight")


@dataclass(frozen=True)
class _Drawn:
    """A matrix in 4 bits: ``codes`` of 0 to 15, scales and a factor as they are stored, and the
    values they stand for.
    """

    codes: NDArray[np.uint8]
    scales: Tensor
    factor: Tensor
    values: Tensor


def _drawn(
    kind: str, shape: tuple[int, int], scale_dtype: torch.dtype, random: np.random.Generator
) -> _Drawn:
    rows, columns = shape
    codes = random.integers(0, 16, (rows, columns), np.uint8)
    size = 32 if kind != "nvfp4" else 16
    groups, near = -(-columns // size), columns**-0.5 / 4
    factor = torch.ones(())
    if kind == "mxfp4":
        bits = random.integers(-1, 2, (rows, groups)) + round(np.log2(near)) + 127
        scales = torch.from_numpy(bits.astype(np.uint8))
        widths = torch.from_numpy(2.0 ** (bits - 127.0)).float()
    else:
        drawn = torch.from_numpy(random.uniform(0.5, 1.5, (rows, groups)).astype(np.float32))
        if kind == "nvfp4":
            factor, scales = (
                torch.tensor(float(2.0 ** round(np.log2(near))) / 100),
                (drawn * 100).to(torch.float8_e4m3fn),
            )
        else:
            scales = (drawn * near).to(scale_dtype)
        widths = scales.float() * factor
    numbers = _E2M1[codes] if kind != "int4" else codes.astype(np.float32) - 8
    values = torch.from_numpy(numbers) * widths.repeat_interleave(size, 1)[:, :columns]
    return _Drawn(codes, scales, factor, values)


def _words(codes: NDArray[np.uint8], per_word: int, dtype: Any) -> Tensor:
    """Codes in words, the first one in the lowest bits."""
    grouped = codes.reshape(len(codes), -1, per_word).astype(np.uint32)
    words = sum(grouped[:, :, k] << np.uint32(4 * k) for k in range(per_word))
    return torch.from_numpy(np.asarray(words).astype(np.uint32).astype(dtype))


def write_pair(
    folder: Path,
    config: dict[str, Any],
    kind: str,
    *,
    num_shards: int = 1,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Path, Path]:
    """The checkpoint ``four_bit`` in the quantisation ``kind`` of CONFIGS, and the one it stands
    for, ``plain``, in new directories of ``folder``. Other tensors are ``dtype`` in both. Experts
    that a family holds in a tensor per layer are in MXFP4 as gpt-oss stores it.
    """
    random, plain, stored = np.random.default_rng(7), dict[str, Tensor](), dict[str, Tensor]()
    stacked: dict[str, list[_Drawn]] = {}
    for name, value in random_tensors(config, 0, dtype).items():
        if value.dim() == 3:
            drawn_each = [_drawn("mxfp4", matrix.T.shape, dtype, random) for matrix in value]
            plain[name] = torch.stack([each.values.T for each in drawn_each]).contiguous().to(dtype)
            blocks = torch.stack([_words(each.codes, 2, np.uint8) for each in drawn_each])
            stored[f"{name}_blocks"] = blocks.unflatten(-1, (-1, 16))
            stored[f"{name}_scales"] = torch.stack([each.scales for each in drawn_each])
            continue
        matrix = _MATRIX.fullmatch(name)
        if matrix is None:
            plain[name] = stored[name] = value
            continue
        drawn = _drawn(kind.split()[0], value.shape, dtype, random)
        plain[name] = drawn.values
        if kind == "mxfp4 of gpt-oss":
            stacked.setdefault(f"{matrix[1]}{matrix[3]}", []).append(drawn)
        else:
            stored |= _tensors(kind, name.removesuffix(".weight"), drawn)
    stored |= _stacked(stacked)
    fields = {"torch_dtype": str(dtype).removeprefix("torch.")}
    for path, tensors, added in (
        (folder / "four_bit", stored, fields | {"quantization_config": CONFIGS[kind]}),
        (folder / "plain", plain, fields),
    ):
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps(config | added))
        save_tensors(path, tensors, num_shards)
    return folder / "four_bit", folder / "plain"


def _tensors(kind: str, matrix: str, drawn: _Drawn) -> dict[str, Tensor]:
    """The tensors of one matrix."""
    shape = torch.tensor(drawn.codes.shape, dtype=torch.int32)
    if kind == "int4":
        words = _words(drawn.codes, 8, np.int32)
        return {
            f"{matrix}.weight_packed": words,
            f"{matrix}.weight_scale": drawn.scales,
            f"{matrix}.weight_shape": shape,
        }
    packed = _words(drawn.codes, 2, np.uint8)
    if kind == "nvfp4 of Model Optimizer":
        return {
            f"{matrix}.weight": packed,
            f"{matrix}.weight_scale": drawn.scales,
            f"{matrix}.weight_scale_2": drawn.factor,
            f"{matrix}.input_scale": torch.ones(()),
        }
    found = {f"{matrix}.weight_packed": packed, f"{matrix}.weight_scale": drawn.scales}
    if kind == "nvfp4":
        found[f"{matrix}.weight_global_scale"] = (1 / drawn.factor).reshape(1)
        found[f"{matrix}.input_global_scale"] = torch.ones(1)
    return found


def _stacked(matrices: dict[str, list[_Drawn]]) -> dict[str, Tensor]:
    """A tensor for the blocks and one for the scales of all experts; rows of gate and up take
    turns.
    """
    found: dict[str, Tensor] = {}
    for name, drawn in matrices.items():
        blocks = torch.stack([_words(each.codes, 2, np.uint8) for each in drawn])
        scales = torch.stack([each.scales for each in drawn])
        layer, _, projection = name.rpartition(".")
        for kind, tensor in (("blocks", blocks.unflatten(-1, (-1, 16))), ("scales", scales)):
            if projection == "down_proj":
                found[f"{layer}.down_proj_{kind}"] = tensor
                continue
            first = projection == "gate_proj"
            merged = f"{layer}.gate_up_proj_{kind}"
            if merged not in found:
                found[merged] = tensor.new_empty(tensor.shape[0], 2 * tensor.shape[1], *tensor.shape[2:])
            found[merged][:, 0 if first else 1 :: 2] = tensor
    return found
