"""Random tensors in a model's shape, which take the place of a checkpoint in benchmarks.

A tensor's values depend on its name and its shape alone: one drawn block, begun at a place that
the name chooses, and repeated. So any part of a tensor is the same wherever it is made, at the
speed of a copy. The length of the block is prime: no two rows of a matrix are alike. Matrices are
normal with a variance of 1 / columns, so that activations keep their size; norms are 1, biases 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .checkpoint import FP8, SCALE_SUFFIX, StoredTensor
from .decoder import Model
from .expected_tensors import expected_shapes, expert_shapes
from .four_bit_tensors import names_of
from .quantisation import StoredFourBit

_NOWHERE = Path("random weights")
_SEED = 20261130
_BLOCK = 4_194_301
_FP8_STD = 32.0  # 14 times that is the largest number of e4m3
_WORDS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "bf16": "BF16", "fp16": "F16"}
_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    FP8: torch.float8_e4m3fn,
    "U8": torch.uint8,
}


@dataclass(frozen=True)
class _Drawn(StoredTensor):
    """A tensor to make: ``normal`` values with standard deviation ``value``, random bytes as
    ``codes``, or a ``constant`` of that value.
    """

    kind: Literal["normal", "codes", "constant"] = "constant"
    value: float = 0.0


class RandomTensors:
    """A ``TensorSource`` that makes all tensors, on ``device``. Linear layers and experts are in
    FP8, or experts in 4 bits, if the config says so.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def tensors(self, model: Model) -> dict[str, StoredTensor]:
        config, fp8, found = model.config, model.config.fp8, dict[str, StoredTensor]()
        linear = model.linear_names() | {f"{matrix}.weight" for matrix in expert_shapes(model)}
        for name, shape in expected_shapes(model).items():
            if fp8 is None or name not in linear or len(shape) == 1:
                found[name] = _plain(name, shape, _WORDS[config.dtype])
                continue
            found[name] = _drawn(name, shape, FP8, "normal", _FP8_STD)
            blocks = (1,) if fp8.whole else fp8.blocks_of(shape)
            scale, scales = shape[-1] ** -0.5 / _FP8_STD, name + SCALE_SUFFIX
            found[scales] = _drawn(scales, blocks, "F32", "constant", scale)
        if config.four_bit is not None:
            for matrix, shape in expert_shapes(model).items():
                found |= {one.name: one for one in _four_bit(matrix, shape, config.four_bit)}
        return found

    def check(self, model: Model, found: Mapping[str, StoredTensor]) -> None:
        """All that the model needs is there."""

    def read(self, wanted: Mapping[str, StoredTensor]) -> Iterator[tuple[str, Tensor]]:
        blocks = dict[tuple[str, float], Tensor]()  # by dtype and deviation
        for name, tensor in wanted.items():
            assert isinstance(tensor, _Drawn)
            if tensor.kind == "constant":
                dtype = _DTYPES[tensor.dtype]
                yield name, torch.full(tensor.shape, tensor.value, device=self._device).to(dtype)
                continue
            key = tensor.dtype, tensor.value
            if key not in blocks:
                blocks[key] = _block(tensor).to(self._device).repeat(2)
            yield name, _cut(blocks[key], name, math.prod(tensor.shape)).view(tensor.shape)


def _plain(name: str, shape: tuple[int, ...], dtype: str) -> _Drawn:
    if len(shape) > 1:
        return _drawn(name, shape, dtype, "normal", shape[-1] ** -0.5)
    return _drawn(name, shape, dtype, "constant", float(name.endswith("norm.weight")))


def _four_bit(matrix: str, shape: tuple[int, int], stored: StoredFourBit) -> Iterator[_Drawn]:
    """Codes, scales and factor of a matrix; any code is a number."""
    (rows, columns), format, names = shape, stored.format, names_of(matrix, stored)
    scale = columns**-0.5 / math.sqrt(np.square(format.numbers).mean())
    yield _drawn(names.codes, (rows, columns // 2), "U8", "codes", 0.0)
    scales = rows, format.groups(columns)
    if names.factor:
        factor = 1 / scale if names.factor_divides else scale
        yield _drawn(names.factor, (1,), "F32", "constant", factor)
        yield _drawn(names.scales, scales, FP8, "constant", 1.0)
    elif format.scale == "e8m0":
        yield _drawn(names.scales, scales, "U8", "constant", 127.0 + round(math.log2(scale)))
    else:
        yield _drawn(names.scales, scales, _WORDS[format.scale], "constant", scale)


def _drawn(
    name: str,
    shape: tuple[int, ...],
    dtype: str,
    kind: Literal["normal", "codes", "constant"],
    value: float,
) -> _Drawn:
    num_bytes = math.prod(shape) * _DTYPES[dtype].itemsize
    return _Drawn(_NOWHERE, dtype, shape, 0, num_bytes, name, kind=kind, value=value)


def _block(tensor: _Drawn) -> Tensor:
    """The values that those of the tensor's kind repeat."""
    draw = np.random.Generator(np.random.PCG64(_SEED))
    if tensor.kind == "codes":
        return torch.from_numpy(draw.integers(0, 256, _BLOCK, np.uint8))
    values = torch.from_numpy(draw.standard_normal(_BLOCK, np.float32))
    return values.mul_(tensor.value).to(_DTYPES[tensor.dtype])


def _cut(twice: Tensor, name: str, count: int) -> Tensor:
    """``count`` values of a block that is there twice, from the place that ``name`` chooses on."""
    start = int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little") % _BLOCK
    if count <= _BLOCK:
        return twice[start : start + count]
    return twice[start : start + _BLOCK].repeat(-(-count // _BLOCK))[:count]
