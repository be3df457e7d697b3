"""FP8 products by DeepGEMM (package ``sgl-deep-gemm``), which compiles a kernel for each shape when
it first meets it. Not run on a card yet.

T tokens  D inner dim  N columns  G = D / 128
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..formats.fp8_format import BLOCK
from ..reference.fp8 import Quantised
from ..reference.sublayers import Product, Projection
from .said_once import SaidOnce

_ALIGNED = 8  # columns of bf16 in 16 bytes, which a tensor map is made of


class DeepGemm:
    """``library``: the module ``deep_gemm``. ``arch``: of the card, 90 for an H100. ``own``: the
    product for shapes that the library does not have; the log says so once for each reason.
    """

    def __init__(self, library: Any, arch: int, own: Product) -> None:
        self._library, self._arch, self._own = library, arch, own
        self._say = SaidOnce("kernels.linear_fp8 = deep_gemm")

    def supports(self, shape: tuple[int, int], arch: int, dtype: torch.dtype) -> str:
        """The reason why there is no product with a matrix [N, D]; empty: there is one."""
        columns, dim = shape
        if arch != 90:
            return f"sm_{arch}: only sm_90 takes scales in float32"
        if dtype != torch.bfloat16:
            return f"results in {dtype}: only bfloat16"
        if dim % BLOCK or columns % _ALIGNED:
            return f"a matrix {columns} x {dim}: only multiples of {_ALIGNED} x {BLOCK}"
        return ""

    def __call__(self, rows: Quantised, projection: Projection, dtype: torch.dtype) -> Tensor:
        weight_ND, scales_GG = projection.weight, projection.scales
        reason = self.supports((weight_ND.shape[0], weight_ND.shape[1]), self._arch, dtype)
        if reason:
            self._say(reason)
            return self._own(rows, projection, dtype)
        y_TN = torch.empty(len(rows.values), len(weight_ND), dtype=dtype, device=weight_ND.device)
        self._library.fp8_gemm_nt((rows.values, rows.scales), (weight_ND, scales_GG), y_TN)
        return y_TN if projection.bias is None else y_TN.add_(projection.bias)
