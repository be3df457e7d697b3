"""The tensors of a checkpoint directory, read from the headers of its safetensors files alone. No
torch here.

Format: https://github.com/huggingface/safetensors#format, and ``model.safetensors.index.json`` for
sharded checkpoints; ``consolidated`` takes the place of ``model`` in Mistral's own.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .quantisation import StoredFp8

_SINGLE_FILES = ("model.safetensors", "consolidated.safetensors")
_INDEX = ".index.json"  # after the name of the single file

FP8 = "F8_E4M3"
# The name of a matrix and this suffix name the tensor of its scales. Values are multiplied by them.
SCALE_SUFFIX = "_scale_inv"
POWERS = "F8_E8M0"  # powers of two, as scales (DeepSeek's ue8m0)
_DTYPE_BYTES = {"BF16": 2, "F16": 2, "F32": 4, FP8: 1, POWERS: 1, "U8": 1, "I32": 4}
_PLAIN_DTYPES = ("BF16", "F16", "F32")
_SCALE_DTYPES = (*_PLAIN_DTYPES, POWERS)
_MAX_HEADER_BYTES = 100_000_000  # the limit of the format's own reader
_NAMES_SHOWN = 4


@dataclass(frozen=True)
class Cut:
    """Rows [first, last) of matrix ``index`` of a tensor [matrices, rows, columns], or [matrices,
    columns, rows] if ``transposed``; every ``step``-th of them.
    """

    index: int
    first: int
    last: int
    transposed: bool
    step: int = 1


@dataclass(frozen=True)
class StoredTensor:
    """A tensor, called ``name`` in ``file``: bytes [begin, end) from the start of the file. A
    ``cut`` makes it a matrix of that tensor; the bytes then tell its order and size.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    name: str
    cut: Cut | None = None

    @property
    def num_bytes(self) -> int:
        return self.end - self.begin


def read_checkpoint(path: Path) -> dict[str, StoredTensor]:
    """The tensors of the checkpoint in directory ``path``, by name.

    Raises ValueError naming the file and what is wrong with it: no checkpoint, a missing shard, a
    truncated file, a header that is not JSON or contradicts itself, a tensor that its index places
    elsewhere.
    """
    for name in _SINGLE_FILES:
        if (index := path / f"{name}{_INDEX}").is_file():
            return _read_shards(path, index)
        if (path / name).is_file():
            return read_header(path / name)
    name = _SINGLE_FILES[0]
    raise ValueError(
        f"{path}: holds neither {name} nor {name}{_INDEX}; only safetensors checkpoints are read"
    )


def _read_shards(path: Path, index: Path) -> dict[str, StoredTensor]:
    shards: dict[str, dict[str, StoredTensor]] = {}
    tensors: dict[str, StoredTensor] = {}
    for name, shard in _weight_map(index).items():
        if shard not in shards:
            shards[shard] = _read_shard(path / shard, index)
        if name not in shards[shard]:
            raise ValueError(f"{path / shard}: holds no tensor {name}, which {index.name} places there")
        tensors[name] = shards[shard][name]
    return tensors


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file. Raises ValueError as ``read_checkpoint`` does."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        if len(prefix) < 8:
            raise ValueError(f"{file}: truncated: {size} bytes, shorter than a safetensors header")
        (length,) = struct.unpack("<Q", prefix)
        if length > _MAX_HEADER_BYTES:
            raise ValueError(f"{file}: not a safetensors file: its header claims {length} bytes")
        if 8 + length > size:
            raise ValueError(f"{file}: truncated: {size} bytes, and its header alone takes {8 + length}")
        text = stream.read(length)
    try:
        header = json.loads(text)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file}: header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise ValueError(f"{file}: header is not a JSON object")
    header.pop("__metadata__", None)
    return {name: _stored(file, name, entry, 8 + length, size) for name, entry in header.items()}


def check_tensors(
    path: Path,
    tensors: Mapping[str, StoredTensor],
    expected: Mapping[str, tuple[int, ...]],
    fp8: StoredFp8 | None = None,
) -> None:
    """Raises ValueError unless ``tensors`` holds every name of ``expected`` with its shape, in a
    dtype that can be loaded.

    ``fp8``: matrices may be in FP8, each with its scales in a tensor of their own.
    """
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise ValueError(f"{path}: {len(missing)} of {len(expected)} tensors are missing: {some(missing)}")
    for name, shape in expected.items():
        found = tensors[name]
        if found.shape != shape:
            raise ValueError(
                f"{found.file}: {name} has shape {list(found.shape)}; config.json makes it {list(shape)}"
            )
        if fp8 and found.dtype == FP8 and len(shape) == 2:
            _check_scales(tensors, name, fp8)
        elif found.dtype not in _PLAIN_DTYPES:
            allowed = f"{', '.join(_PLAIN_DTYPES)}" + (f", and {FP8} for matrices" if fp8 else "")
            raise ValueError(f"{found.file}: {name} has dtype {found.dtype}; supported: {allowed}")


def _check_scales(tensors: Mapping[str, StoredTensor], name: str, fp8: StoredFp8) -> None:
    """Raises ValueError unless the matrix ``name`` in FP8 has its scales."""
    values, scales = tensors[name], tensors.get(name + SCALE_SUFFIX)
    if scales is None:
        raise ValueError(f"{values.file}: {name} is in {FP8}, but {name + SCALE_SUFFIX} is missing")
    block, blocks = fp8.block, fp8.blocks_of(values.shape)
    if fp8.whole and math.prod(scales.shape) != 1:
        found = f"{scales.file}: {name + SCALE_SUFFIX} has shape {list(scales.shape)}"
        raise ValueError(f"{found}; config.json makes it one scale per matrix")
    if not fp8.whole and scales.shape != blocks:
        found = f"{scales.file}: {name + SCALE_SUFFIX} has shape {list(scales.shape)}"
        needed = f"{list(blocks)} blocks of {block[0]} x {block[1]}"
        raise ValueError(f"{found}; {name} of shape {list(values.shape)} has {needed}")
    if scales.dtype not in _SCALE_DTYPES:
        found = f"{scales.file}: {name + SCALE_SUFFIX} has dtype {scales.dtype}"
        raise ValueError(f"{found}; supported: {', '.join(_SCALE_DTYPES)}")


def some(names: list[str]) -> str:
    """The first of ``names``, for an error."""
    rest = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _weight_map(index: Path) -> dict[str, str]:
    try:
        content = json.loads(index.read_bytes())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{index}: not readable as JSON: {error}") from None
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: weight_map is missing or empty")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            found = f"{index}: weight_map[{json.dumps(name)}] is {json.dumps(shard)}"
            raise ValueError(f"{found}; expected the name of a file beside it")
    return weight_map


def _read_shard(shard: Path, index: Path) -> dict[str, StoredTensor]:
    if not shard.is_file():
        raise ValueError(f"{shard}: no such file, and {index.name} places tensors there")
    return read_header(shard)


def _stored(file: Path, name: str, entry: Any, data_start: int, file_size: int) -> StoredTensor:
    try:
        dtype = str(entry["dtype"])
        shape = tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        sound = all(isinstance(value, int) and value >= 0 for value in (*shape, begin, end)) and begin <= end
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise ValueError(f"{file}: header entry of {name} is malformed: {json.dumps(entry)[:200]}")
    if data_start + end > file_size:
        raise ValueError(f"{file}: truncated: {file_size} bytes, and {name} ends at {data_start + end}")
    width = _DTYPE_BYTES.get(dtype)
    if width is not None and end - begin != width * math.prod(shape):
        needed = f"shape {list(shape)} in {dtype} takes {width * math.prod(shape)}"
        raise ValueError(f"{file}: {name} takes {end - begin} bytes; {needed}")
    return StoredTensor(file, dtype, shape, data_start + begin, data_start + end, name)
