"""Weights in 4 bits with a scale for each group of a row. Imports no torch.

A value is its code's number, times the scale of its group, times a factor of its matrix if the
format has one. ``int4``: -8 to 7, stored with 8 added (compressed-tensors "pack-quantized").
``mxfp4``: E2M1 with powers of two as scales (OCP Microscaling 1.0). ``nvfp4``: E2M1 with E4M3
scales and a float32 factor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MULTIPLE = 8  # values of a row come in whole words of int4

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_SCALE_BYTES = {"bf16": 2, "fp16": 2, "e8m0": 1, "e4m3": 1}


@dataclass(frozen=True)
class FourBitFormat:
    """``group`` values of a row share a scale of kind ``scale``; a row's last group may be
    shorter. ``has_factor``: every matrix has a float32 factor.
    """

    name: Literal["int4", "mxfp4", "nvfp4"]
    group: int
    scale: Literal["bf16", "fp16", "e8m0", "e4m3"]
    has_factor: bool = False

    @property
    def numbers(self) -> tuple[float, ...]:
        """The numbers of codes 0 to 15."""
        if self.name == "int4":
            return tuple(float(code - 8) for code in range(16))
        return _E2M1 + tuple(-number for number in _E2M1)

    def groups(self, columns: int) -> int:
        """Scales of a row."""
        return -(-columns // self.group)

    def matrix_bytes(self, rows: int, columns: int) -> int:
        """Bytes of a matrix with its scales and its factor."""
        row = columns // 2 + self.groups(columns) * _SCALE_BYTES[self.scale]
        return rows * row + 4 * self.has_factor

    def expert_bytes(self, hidden: int, width: int) -> int:
        """Bytes of an expert: gate, up and down matrices."""
        return 2 * self.matrix_bytes(width, hidden) + self.matrix_bytes(hidden, width)


INT4 = FourBitFormat("int4", 32, "bf16")
INT4_FP16 = FourBitFormat("int4", 32, "fp16")
MXFP4 = FourBitFormat("mxfp4", 32, "e8m0")
NVFP4 = FourBitFormat("nvfp4", 16, "e4m3", has_factor=True)
