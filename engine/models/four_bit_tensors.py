"""The tensors of a checkpoint that hold experts in 4 bits: names, shapes and dtypes by layout. No
torch here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from .checkpoint import FP8, POWERS, StoredTensor, some
from .quantisation import StoredFourBit

CODES, SCALES = "weight_packed", "weight_scale"
_MODELOPT_CODES = "weight"
_DIVISOR, _FACTOR = "weight_global_scale", "weight_scale_2"
# For activations in 4 bits, or the shape before packing.
_UNUSED = ("weight_shape", "input_global_scale", "input_scale")
_SCALE_DTYPES = {"bf16": ("BF16",), "fp16": ("F16",), "e8m0": ("U8", POWERS), "e4m3": (FP8,)}


@dataclass(frozen=True)
class FourBitNames:
    """The names of one matrix's tensors. ``factor`` is empty if it has none; with
    ``factor_divides`` values are divided by it.
    """

    codes: str
    scales: str
    factor: str
    factor_divides: bool


def names_of(matrix: str, stored: StoredFourBit) -> FourBitNames:
    """The tensors of ``matrix``, a name without its last part."""
    modelopt = stored.layout == "modelopt"
    factor = _FACTOR if modelopt else _DIVISOR
    return FourBitNames(
        codes=f"{matrix}.{_MODELOPT_CODES if modelopt else CODES}",
        scales=f"{matrix}.{SCALES}",
        factor=f"{matrix}.{factor}" if stored.format.has_factor else "",
        factor_divides=not modelopt,
    )


def unused_names(matrix: str) -> Iterator[str]:
    """Tensors of a matrix that nothing reads."""
    return (f"{matrix}.{name}" for name in _UNUSED)


def check_four_bit(
    path: Path,
    tensors: Mapping[str, StoredTensor],
    matrices: Mapping[str, tuple[int, int]],
    stored: StoredFourBit,
) -> None:
    """Raises ValueError unless ``tensors`` holds the tensors of all ``matrices``: rows and columns
    by name.
    """
    format = stored.format
    word = "I32" if format.name == "int4" and stored.layout == "compressed" else "U8"
    codes_dtypes, values = (word,), {"I32": 8, "U8": 2}[word]
    missing: list[str] = []
    for matrix, (rows, columns) in matrices.items():
        names = names_of(matrix, stored)
        wanted: list[tuple[str, tuple[tuple[int, ...], ...], tuple[str, ...]]] = [
            (names.codes, ((rows, columns // values),), codes_dtypes),
            (names.scales, ((rows, format.groups(columns)),), _SCALE_DTYPES[format.scale]),
        ]
        if names.factor:
            wanted.append((names.factor, ((1,), ()), ("F32",)))
        for name, shapes, dtypes in wanted:
            if name not in tensors:
                missing.append(name)
            else:
                _check(name, tensors[name], shapes, dtypes, f"{rows} x {columns} in {format.name}")
    if missing:
        raise ValueError(
            f"{path}: {len(missing)} tensors of experts in {format.name} are missing: {some(missing)}"
        )


def check_others(path: Path, tensors: Mapping[str, StoredTensor], expected: Mapping[str, object]) -> None:
    """Raises ValueError for a matrix of ``expected`` that is stored in 4 bits."""
    for name in expected:
        if name not in tensors and f"{name}_packed" in tensors:
            raise ValueError(
                f"{tensors[f'{name}_packed'].file}: {name} is stored in 4 bits; "
                "supported: 4 bits in routed experts only"
            )


def _check(
    name: str, found: StoredTensor, shapes: tuple[tuple[int, ...], ...], dtypes: tuple[str, ...], matrix: str
) -> None:
    if found.shape not in shapes:
        raise ValueError(
            f"{found.file}: {name} has shape {list(found.shape)}; a matrix of {matrix} has {list(shapes[0])}"
        )
    if found.dtype not in dtypes:
        raise ValueError(f"{found.file}: {name} has dtype {found.dtype}; supported: {', '.join(dtypes)}")
