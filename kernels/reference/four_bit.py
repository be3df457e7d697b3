"""Experts with weights in 4 bits (``formats.four_bit_format``): packed, and computed with as what
they stand for.

N rows  K values of a row  G groups of a row  M pairs  S expert slots  D hidden  F expert width
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats.four_bit_format import FourBitFormat
from .experts import PLAIN_FORM, ExpertForm, experts_reference
from .fp8 import from_e4m3

SCALE_DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "e8m0": torch.float8_e8m0fnu,
    "e4m3": torch.float8_e4m3fn,
}
# Expert weights after ``pack_four_bit``, in the column's form.
PackedFourBit = Any
_LARGEST_E2M1, _LARGEST_E4M3 = 6.0, 448.0
_LEAST = 1e-30  # keeps groups of zeros from division by zero


@dataclass(frozen=True)
class FourBit:
    """Matrices in ``format``: ``codes`` uint8 [..., N, K / 2], two in a byte, the even one in the
    low bits; ``scales`` [..., N, G] in their own dtype. ``factors`` float32 [..., P], where the
    format has them, belong to P equal parts of the rows. Expert weights: w13 [S, 2F, D] with P = 2,
    gate and up; w2 [S, D, F] with P = 1.
    """

    format: FourBitFormat
    codes: Tensor
    scales: Tensor
    factors: Tensor | None = None

    @property
    def columns(self) -> int:
        return 2 * self.codes.shape[-1]

    def of(self, index: Tensor) -> FourBit:
        """The matrices of some slots."""
        scales = _select(self.scales.view(_bits(self.scales)), index).view(self.scales.dtype)
        factors = None if self.factors is None else _select(self.factors, index)
        return FourBit(self.format, _select(self.codes, index), scales, factors)


def pack_codes(codes: Tensor) -> Tensor:
    """Codes [..., K] of 0 to 15 as uint8 [..., K / 2]."""
    codes = codes.to(torch.uint8)
    return codes[..., ::2] | codes[..., 1::2] << 4


def unpack_codes(packed: Tensor) -> Tensor:
    """uint8 [..., K / 2] as codes [..., K]."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def scales_of(w: FourBit) -> Tensor:
    """The scales [..., N, G] as float32, times the factors."""
    scales = from_e4m3(w.scales, torch.float32) if w.format.scale == "e4m3" else w.scales.float()
    if w.factors is None:
        return scales
    rows = scales.shape[-2] // w.factors.shape[-1]
    return scales * w.factors.repeat_interleave(rows, -1)[..., None]


def dequantise(w: FourBit) -> Tensor:
    """The values as float32 [..., N, K]."""
    numbers = torch.tensor(w.format.numbers, device=w.codes.device)
    values = numbers[unpack_codes(w.codes).to(torch.int64)]
    spread = scales_of(w).repeat_interleave(w.format.group, -1)
    return values * spread[..., : values.shape[-1]]


def quantise(w: Tensor, format: FourBitFormat, parts: int = 1) -> FourBit:
    """The nearest codes for w [..., N, K] under scales that fit each group's largest value.
    ``parts``: of the rows, each with a factor of its own if the format has factors.
    """
    columns = w.shape[-1]
    groups = F.pad(w.float(), (0, -columns % format.group)).unflatten(-1, (-1, format.group))
    most = groups.abs().amax(-1)
    factors = None
    if format.scale == "e8m0":
        exponents = most.clamp_min(2.0**-125).log2().floor() - 2
        scales = exponents.clamp_min(-126).exp2().to(torch.float8_e8m0fnu)
    elif format.has_factor:
        part = most.unflatten(-2, (parts, -1))
        factors = (part.amax((-2, -1)) / (_LARGEST_E2M1 * _LARGEST_E4M3)).clamp_min(_LEAST)
        scales = (part / _LARGEST_E2M1 / factors[..., None, None]).flatten(-3, -2).to(torch.float8_e4m3fn)
    else:
        scales = (most / 7.5).clamp_min(_LEAST).to(SCALE_DTYPES[format.scale])
    empty = FourBit(format, w.new_empty(0, dtype=torch.uint8), scales, factors)
    scaled = groups / scales_of(empty).clamp_min(_LEAST)[..., None]
    codes = _nearest(scaled, format).flatten(-2)[..., :columns]
    return FourBit(format, pack_codes(codes), scales, factors)


def pack_four_bit(w: FourBit) -> PackedFourBit:
    """Expert weights in the form that ``experts_four_bit`` reads fastest, over the same memory."""
    return w


def experts_four_bit(
    x_ND: Tensor,
    rows_M: Tensor,
    slots_M: Tensor,
    w13: FourBit,
    w2: FourBit,
    counts_S: Tensor,
    form: ExpertForm = PLAIN_FORM,
) -> Tensor:
    """``experts.experts_reference`` with the dequantised weights, rounded to the dtype of x."""
    hit, places = slots_M.unique(return_inverse=True)
    real = hit >= 0
    first = int((~real).sum())
    hit, places_M = hit[real], torch.where(slots_M >= 0, places - first, -1)
    w13_SFD, w2_SDF = (dequantise(w.of(hit)).to(x_ND.dtype) for w in (w13, w2))
    counts = counts_S.new_zeros(len(hit))
    if form.biases is not None:
        form = replace(form, biases=(form.biases[0][hit], form.biases[1][hit]))
    y_MD = experts_reference(x_ND, rows_M, places_M, w13_SFD, w2_SDF, counts, form)
    counts_S.index_add_(0, hit, counts)
    return y_MD


def _nearest(scaled: Tensor, format: FourBitFormat) -> Tensor:
    """Codes of the nearest numbers, ties to even codes."""
    if format.name == "int4":
        return (scaled.round() + 8).clamp(0, 15).to(torch.uint8)
    numbers = torch.tensor(format.numbers[:8], device=scaled.device)
    middles = (numbers[1:] + numbers[:-1]) / 2
    sizes = scaled.abs()
    codes = torch.bucketize(sizes, middles)
    tied = sizes == torch.cat((middles, middles.new_tensor([-1.0])))[codes]
    codes = codes + (tied & (codes % 2 == 1))
    return (codes + 8 * (scaled < 0)).to(torch.uint8)


def _select(part: Tensor, index: Tensor) -> Tensor:
    return part.index_select(0, index.to(part.device))


def _bits(part: Tensor) -> torch.dtype:
    """The integers that hold the bits of a tensor: not every op takes eight-bit floats."""
    return torch.uint8 if part.element_size() == 1 else torch.int16
