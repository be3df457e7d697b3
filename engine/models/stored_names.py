"""Finds the tensors of a text model with separate experts in those of a checkpoint. No torch here.

A model of text and images keeps the text model's tensors behind a prefix and those of its vision
tower beside them. Some checkpoints hold the experts of a layer in two tensors. Mistral's own format
has other names for all.
"""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from . import mistral_format
from .checkpoint import SCALE_SUFFIX, Cut, StoredTensor
from .config import CheckpointNames
from .four_bit_tensors import CODES, SCALES

_LOG = logging.getLogger(__name__)

_WRAPPINGS = (("model.language_model.", "model."), ("language_model.", ""))
_HEAD = "lm_head."
_SCALE = ".weight_scale"
# Static scales of activations. Products measure the scales of the rows that they quantise.
UNUSED_SCALES = ("activation_scale", ".input_scale")
_STACKED = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)(\.weight)?")
_STACKED_BIAS = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)[._]bias")
_STACKED_SCALES = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)(\.weight)?_scale_inv")
_STACKED_FOUR_BIT = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)_(blocks|scales)")


def text_model(path: Path, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors of the text model in ``tensors``, by its names. Logs which others there are."""
    rename = _renaming(tensors)
    if rename is None:
        return dict(tensors)
    found = dict[str, StoredTensor]()
    others = Counter[str]()
    for name, tensor in tensors.items():
        if (ours := rename(name)) is not None:
            found[ours] = tensor
        else:
            others[".".join(name.split(".")[: 2 if name.startswith("model.") else 1])] += 1
    if others:
        parts = ", ".join(f"{part} ({count} tensors)" for part, count in sorted(others.items()))
        _LOG.info("%s: only the text model is served; left out: %s", path, parts)
    return found


def _renaming(tensors: Mapping[str, StoredTensor]) -> Callable[[str], str | None] | None:
    """Our name for a checkpoint's; None for a tensor that is no part of the text model. None where
    all names are ours.
    """
    if mistral_format.EMBEDDING in tensors:
        return mistral_format.our_name
    for prefix, ours in _WRAPPINGS:
        if any(name.startswith(prefix) for name in tensors):
            return partial(_unwrapped, prefix, ours)
    return None


def _unwrapped(prefix: str, ours: str, name: str) -> str | None:
    if name.startswith(prefix):
        return ours + name.removeprefix(prefix)
    return name if name.startswith(_HEAD) else None


def scales_by_our_name(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """``tensors`` with scales of matrices by DeepSeek-V3's name; some checkpoints have another."""
    return {
        name.removesuffix(_SCALE) + ".weight" + SCALE_SUFFIX if name.endswith(_SCALE) else name: tensor
        for name, tensor in tensors.items()
    }


def separate_experts(tensors: Mapping[str, StoredTensor], names: CheckpointNames) -> dict[str, StoredTensor]:
    """``tensors`` with those that hold all experts of a layer replaced by their parts, an expert's
    matrix each.
    """
    found: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        stacked = _STACKED.fullmatch(name) if len(tensor.shape) == 3 else None
        four_bit = _STACKED_FOUR_BIT.fullmatch(name) if len(tensor.shape) in (3, 4) else None
        scales = _STACKED_SCALES.fullmatch(name) if len(tensor.shape) == 3 else None
        bias = _STACKED_BIAS.fullmatch(name) if len(tensor.shape) == 2 else None
        if scales is not None:
            found |= _scale_parts(scales[1], scales[2] == "gate_up_proj", tensor, names)
        elif bias is not None:
            found |= _bias_parts(bias[1], bias[2] == "gate_up_proj", tensor, names)
        elif stacked is not None:
            found |= _parts(stacked[1], stacked[2] == "gate_up_proj", tensor, names)
        elif four_bit is not None:
            suffix = CODES if four_bit[3] == "blocks" else SCALES
            found |= _four_bit_parts(four_bit[1], four_bit[2] == "gate_up_proj", suffix, tensor, names)
        else:
            found[name] = tensor
    return found


def _parts(
    layer: str, merged: bool, tensor: StoredTensor, names: CheckpointNames
) -> Iterator[tuple[str, StoredTensor]]:
    """The matrices in a tensor [experts, rows, columns]; ``merged``: gate and up."""
    num_experts, *sizes = tensor.shape
    rows, columns = reversed(sizes) if names.transposed_experts else sizes
    for expert in range(num_experts):
        for projection, first, last, step in _places(merged, rows, names):
            cut = Cut(expert, first, last, names.transposed_experts, step)
            yield f"{layer}.{expert}.{projection}.weight", _cut_out(tensor, rows, columns, cut)


def _cut_out(tensor: StoredTensor, rows: int, columns: int, cut: Cut) -> StoredTensor:
    """Some rows of one of the matrices [rows, columns] in a tensor."""
    width = tensor.num_bytes // (tensor.shape[0] * rows * columns)
    begin = tensor.begin + width * columns * (cut.index * rows + cut.first)
    num_rows = len(range(cut.first, cut.last, cut.step))
    return replace(
        tensor, shape=(num_rows, columns), begin=begin, end=begin + width * columns * num_rows, cut=cut
    )


def _scale_parts(
    layer: str, merged: bool, tensor: StoredTensor, names: CheckpointNames
) -> Iterator[tuple[str, StoredTensor]]:
    """The scales in a tensor [experts, rows, columns] of blocks. Gate and up share a single row."""
    num_experts, rows, columns = tensor.shape
    places = _places(merged, rows, names)
    if merged and rows == 1:
        places = tuple((projection, 0, 1, 1) for projection in names.projections[:2])
    for expert in range(num_experts):
        for projection, first, last, step in places:
            cut = Cut(expert, first, last, transposed=False, step=step)
            name = f"{layer}.{expert}.{projection}.weight{SCALE_SUFFIX}"
            yield name, _cut_out(tensor, rows, columns, cut)


def _bias_parts(
    layer: str, merged: bool, tensor: StoredTensor, names: CheckpointNames
) -> Iterator[tuple[str, StoredTensor]]:
    """The biases in a tensor [experts, rows]."""
    num_experts, rows = tensor.shape
    width = tensor.num_bytes // (num_experts * rows)
    for expert in range(num_experts):
        for projection, first, last, step in _places(merged, rows, names):
            begin = tensor.begin + width * (expert * rows + first)
            num_rows = len(range(first, last, step))
            cut = Cut(expert, first, last, transposed=False, step=step)
            yield (
                f"{layer}.{expert}.{projection}.bias",
                replace(tensor, shape=(num_rows,), begin=begin, end=begin + width * num_rows, cut=cut),
            )


def _places(merged: bool, rows: int, names: CheckpointNames) -> tuple[tuple[str, int, int, int], ...]:
    """The first row, the last + 1 and the step of each projection among the rows of an expert."""
    gate, up, down = names.projections
    if not merged:
        return ((down, 0, rows, 1),)
    if names.gate_up_turns:
        return (gate, 0, rows, 2), (up, 1, rows, 2)
    return (gate, 0, rows // 2, 1), (up, rows // 2, rows, 1)


def _four_bit_parts(
    layer: str, merged: bool, suffix: str, tensor: StoredTensor, names: CheckpointNames
) -> Iterator[tuple[str, StoredTensor]]:
    """The codes or scales of matrices in a tensor [experts, rows, ...] of gpt-oss, whose rows of
    gate and up take turns if they are ``merged``.
    """
    num_experts, rows, *row = tensor.shape
    gate, up, down = names.projections
    step = 2 if merged else 1
    size = tensor.num_bytes // (num_experts * step)
    for expert in range(num_experts):
        for first, projection in enumerate((gate, up) if merged else (down,)):
            begin = tensor.begin + (expert * step + first) * size
            yield (
                f"{layer}.{expert}.{projection}.{suffix}",
                replace(
                    tensor,
                    shape=(rows // step, math.prod(row)),
                    begin=begin,
                    end=begin + size,
                    cut=Cut(expert, first, rows, transposed=False, step=step),
                ),
            )
