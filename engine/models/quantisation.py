"""The ``quantization_config`` of a config.json: matrices in FP8 with a scale per block or per
matrix, or routed experts in 4 bits. Any other quantisation is refused. No torch here.

Formats: DeepSeek-V3's FP8 (arXiv 2412.19437, section 3.3); FP8 with one scale per matrix
(Mistral-Small-4, Hy3-FP8), whose scales of activations are left unused, as products measure their
own; compressed-tensors "float-quantized" (Mistral-Large-3), "pack-quantized",
"nvfp4-pack-quantized" and "mxfp4-pack-quantized"; NVFP4 of NVIDIA's Model Optimizer; MXFP4 as
gpt-oss ships it.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from ...kernels.formats.four_bit_format import INT4, INT4_FP16, MULTIPLE, MXFP4, NVFP4, FourBitFormat
from ...kernels.formats.fp8_format import KERNEL_BLOCK
from .config_fields import Fields

_REGEX = "re:"
_COMPRESSED: dict[str, FourBitFormat] = {
    "pack-quantized": INT4,
    "nvfp4-pack-quantized": NVFP4,
    "mxfp4-pack-quantized": MXFP4,
}
_COMPRESSED_FP8 = "float-quantized"
_METHODS = (
    'supported: "fp8", "compressed-tensors", "mxfp4", "modelopt", or a checkpoint in bf16, fp16 or fp32'
)


@dataclass(frozen=True)
class StoredFourBit:
    """How a checkpoint stores linear layers in 4 bits. ``layout`` names the tensors: those of
    compressed-tensors, of Model Optimizer, or a tensor per layer for all experts (gpt-oss).

    ``targets`` and ``kept``: patterns for the names of modules in 4 bits, and of those among them
    that are not; ``kept_field`` is the field of the latter.
    """

    format: FourBitFormat
    layout: Literal["compressed", "modelopt", "stacked"]
    targets: tuple[str, ...]
    kept: tuple[str, ...]
    kept_field: str

    def stores(self, module: str) -> bool:
        """Whether the linear layer ``module`` is in 4 bits."""
        return _matches(self.targets, module) and not _matches(self.kept, module)


@dataclass(frozen=True)
class StoredFp8:
    """Matrices in e4m3 with a scale per ``block`` of so many rows and columns, or where ``whole``
    one per matrix, which then holds for every block.
    """

    block: tuple[int, int]
    whole: bool = False

    def blocks_of(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """The blocks of a matrix of ``shape``, by rows and columns."""
        rows, columns = (-(-size // each) for size, each in zip(shape, self.block, strict=True))
        return rows, columns


def read_fp8(fields: Fields) -> StoredFp8 | None:
    """How matrices are stored in FP8. None for a checkpoint without."""
    stored = fields.nested("quantization_config")
    if stored is not None and _is_compressed_fp8(stored):
        return _read_compressed_fp8(stored)
    if stored is None or stored.raw("quant_method") in _FOUR_BIT_READERS:
        return None
    if stored.raw("quant_method") != "fp8":
        raise stored.refuse("quant_method", _METHODS)
    stored.expect("fmt", "e4m3", "float8_e4m3fn")
    if not stored.has("weight_block_size"):
        stored.expect("activation_scheme", "dynamic", "static")
        return StoredFp8(KERNEL_BLOCK, whole=True)
    stored.expect("activation_scheme", "dynamic")
    return StoredFp8(_block(stored, "weight_block_size", ", or null for a scale per matrix"))


def _block(stored: Fields, name: str, otherwise: str = "") -> tuple[int, int]:
    block = stored.integers(name)
    if len(block) != 2 or 0 in block:
        raise stored.refuse(name, f"expected the rows and columns of a block, as in [128, 128]{otherwise}")
    return block[0], block[1]


def _is_compressed_fp8(stored: Fields) -> bool:
    kind = (stored.raw("quant_method"), stored.raw("format"))
    return kind == ("compressed-tensors", _COMPRESSED_FP8)


def _read_compressed_fp8(stored: Fields) -> StoredFp8:
    """compressed-tensors' FP8 (Mistral-Large-3). Matrices that it leaves out say so by their dtype.
    Products measure the scales of activations, whatever the file says of them.
    """
    group = _only_group(stored)
    group.expect("format", _COMPRESSED_FP8)
    weights = group.nested("weights")
    if weights is None:
        raise group.refuse("weights", "expected an object")
    for name, expected in (("num_bits", 8), ("type", "float"), ("symmetric", True), ("dynamic", False)):
        weights.expect(name, expected)
    weights.expect("strategy", "block", "tensor")
    if weights.raw("strategy") == "tensor":
        return StoredFp8(KERNEL_BLOCK, whole=True)
    return StoredFp8(_block(weights, "block_structure"))


def read_four_bit(fields: Fields, dtype: str) -> StoredFourBit | None:
    """How routed experts are stored, or None where they are not in 4 bits. ``dtype``: the
    checkpoint's, which scales of int4 have.
    """
    stored = fields.nested("quantization_config")
    if stored is not None and _is_compressed_fp8(stored):
        return None
    reader = None if stored is None else _FOUR_BIT_READERS.get(str(stored.raw("quant_method")))
    return None if stored is None or reader is None else reader(stored, dtype)


def check_modules(
    fields: Fields, stored: StoredFourBit, experts: Iterable[str], others: Iterable[str]
) -> None:
    """Raises ValueError unless the modules ``experts`` are in 4 bits and the linear layers
    ``others`` are not. A checkpoint of text and images may have a prefix before its names.
    """
    source, name = f"{fields.source}: quantization_config", stored.format.name
    for module in experts:
        if not stored.stores(module):
            raise ValueError(
                f"{source}: {stored.kept_field} leaves {module} out of {name}; "
                "supported: all routed experts in 4 bits"
            )
    for module in others:
        if stored.stores(module) and stored.stores(f"language_model.{module}"):
            raise ValueError(
                f"{source}: {module} is in {name}; supported: 4 bits in routed experts only, "
                f"every other linear layer in {stored.kept_field}"
            )


def check_sizes(fields: Fields, stored: StoredFourBit, sizes: dict[str, int]) -> None:
    """Raises ValueError for rows, by the field of their length, that 4 bits cannot hold."""
    for field, size in sizes.items():
        if size % MULTIPLE:
            raise ValueError(
                f"{fields.source}: {field} is {size}; expected a multiple of {MULTIPLE} for experts in "
                f"{stored.format.name}"
            )


def _read_compressed(stored: Fields, dtype: str) -> StoredFourBit:
    kind = str(stored.raw("format"))
    if kind not in _COMPRESSED:
        known = ", ".join(f'"{name}"' for name in (*_COMPRESSED, _COMPRESSED_FP8))
        raise stored.refuse("format", f"supported: {known}")
    found = _COMPRESSED[kind]
    group = _only_group(stored)
    group.expect("format", kind)
    weights = group.nested("weights")
    if weights is None:
        raise group.refuse("weights", "expected an object")
    _check_weights(weights, found)
    if found is INT4 and dtype == "float16":
        found = INT4_FP16
    targets = _patterns(group, "targets")
    return StoredFourBit(found, "compressed", targets, _patterns(stored, "ignore"), "ignore")


def _only_group(stored: Fields) -> Fields:
    groups = stored.nested("config_groups")
    names = groups.names() if groups is not None else ()
    if groups is None or len(names) != 1:
        raise stored.refuse("config_groups", "supported: one group")
    group = groups.nested(names[0])
    if group is None:
        raise groups.refuse(names[0], "expected an object")
    return group


def _check_weights(weights: Fields, found: FourBitFormat) -> None:
    """Refuses fields of a group's weights that the format cannot mean. Whether activations should
    be quantised too is not asked: products are those of the dequantised weights.
    """
    weights.expect("num_bits", 4)
    weights.expect("type", "int" if found.name == "int4" else "float")
    weights.expect("group_size", found.group)
    weights.expect("symmetric", True)
    weights.expect("dynamic", False)
    weights.expect("strategy", "tensor_group" if found.has_factor else "group")
    weights.expect("actorder", False, "static", "weight")  # none permutes the columns of groups
    for name in ("num_bits", "group_size"):
        weights.integer(name)


def _read_modelopt(stored: Fields, dtype: str) -> StoredFourBit:
    if stored.raw("quant_algo") != "NVFP4":
        raise stored.refuse("quant_algo", 'supported: "NVFP4"')
    stored.expect("group_size", NVFP4.group)
    field = "exclude_modules" if stored.has("exclude_modules") else "ignore"
    return StoredFourBit(NVFP4, "modelopt", ("Linear",), _patterns(stored, field), field)


def _read_mxfp4(stored: Fields, dtype: str) -> StoredFourBit:
    field = "modules_to_not_convert"
    experts = (_REGEX + r".*\.experts(\..*)?$",)
    return StoredFourBit(MXFP4, "stacked", experts, _patterns(stored, field), field)


_FOUR_BIT_READERS = {
    "compressed-tensors": _read_compressed,
    "modelopt": _read_modelopt,
    "mxfp4": _read_mxfp4,
}


def _patterns(fields: Fields, name: str) -> tuple[str, ...]:
    """The patterns in a list: a module's name, perhaps with wildcards, or an expression after
    ``re:``.
    """
    patterns = fields.raw(name) or []
    if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
        raise fields.refuse(name, "expected a list of names of modules")
    for pattern in patterns:
        if pattern.startswith(_REGEX):
            try:
                re.compile(pattern.removeprefix(_REGEX))
            except re.error as error:
                raise fields.refuse(name, f"{pattern} is no regular expression: {error}") from None
    return tuple(patterns)


def _matches(patterns: tuple[str, ...], module: str) -> bool:
    """Whether a pattern names the module, one around it, or its class, Linear."""
    for pattern in patterns:
        if pattern.startswith(_REGEX):
            if re.match(pattern.removeprefix(_REGEX), module):
                return True
        elif pattern == "Linear" or any(
            fnmatch.fnmatchcase(module, name) for name in (pattern, f"{pattern}.*")
        ):
            return True
    return False
