"""Block-scaled FP8 (e4m3): activations with a scale per row and 128 values, weights with one per
128 x 128 block.

The scheme of DeepSeek-V3 (arXiv 2412.19437, section 3.3). A value is its eight bits times its
scale; scales are float32.

N rows  D values of a row  G = ceil(D / 128) groups  M pairs  S expert slots  F expert width
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats.fp8_format import BLOCK, KERNEL_BLOCK
from .norm import rms_norm

LARGEST = 448.0  # largest number of float8_e4m3fn
LEAST_SCALE = 1e-12  # keeps groups of zeros from division by zero
_BAND = 8  # blocks of rows widened at once
_E4M3_IN_BF16 = 0x87F0 - 0x10000  # sign, exponent and mantissa, as an int16


@dataclass(frozen=True)
class Quantised:
    """``values`` float8_e4m3fn and their ``scales``. Rows: [N, D] and [N, G]. Expert weights: w13
    [S, 2F, D] and [S, 2, ceil(F / 128), ceil(D / 128)], with gate and up apart as in checkpoints;
    w2 [S, D, F] and [S, ceil(D / 128), ceil(F / 128)].
    """

    values: Tensor
    scales: Tensor


@dataclass(frozen=True)
class NormedRows:
    """Rows [N, D] in the model's dtype, and the same quantised, for readers of either."""

    wide: Tensor
    eight: Quantised


Normed = Tensor | NormedRows
"""The norm of a residual; quantised too where experts in FP8 read it."""


def wide_of(rows: Normed) -> Tensor:
    """Rows in the model's dtype."""
    return rows.wide if isinstance(rows, NormedRows) else rows


def quantise_rows(x_ND: Tensor) -> Quantised:
    """Scales each group of 128 values of a row to the range of FP8."""
    num_rows, dim = x_ND.shape
    groups_NGB = F.pad(x_ND.float(), (0, -dim % BLOCK)).view(num_rows, -(-dim // BLOCK), BLOCK)
    scales_NG = (groups_NGB.abs().amax(-1) / LARGEST).clamp_min(LEAST_SCALE)
    values = (groups_NGB / scales_NG[..., None]).to(torch.float8_e4m3fn)
    return Quantised(values.flatten(1)[:, :dim].contiguous(), scales_NG)


def quantise_blocks(w: Tensor, block: tuple[int, int] = KERNEL_BLOCK) -> Quantised:
    """Scales each block of w [..., rows, columns] to the range of FP8. Scales are [..., ceil(rows /
    128), ceil(columns / 128)], or according to ``block``.
    """
    rows, columns = w.shape[-2:]
    padded = F.pad(w.float(), (0, -columns % block[1], 0, -rows % block[0]))
    blocks = padded.unflatten(-1, (-1, block[1])).unflatten(-3, (-1, block[0]))
    scales = (blocks.abs().amax((-3, -1)) / LARGEST).clamp_min(LEAST_SCALE)
    values = (padded / _spread(scales, padded.shape, block)).to(torch.float8_e4m3fn)
    return Quantised(values[..., :rows, :columns].contiguous(), scales)


def quantise_w13(w13_SFD: Tensor) -> Quantised:
    """Quantises the gate rows and the up rows of w13 separately."""
    halves = quantise_blocks(w13_SFD.unflatten(1, (2, -1)))
    return Quantised(halves.values.flatten(1, 2), halves.scales)


def widen_rows(x: Quantised) -> Tensor:
    """The values as float32 [N, D]."""
    return from_e4m3(x.values, torch.float32) * x.scales.repeat_interleave(BLOCK, -1)[:, : x.values.shape[1]]


def widen_blocks(w: Quantised, block: tuple[int, int] = KERNEL_BLOCK) -> Tensor:
    """The values as float32 [..., rows, columns]; takes w13 too."""
    if w.scales.dim() > w.values.dim():
        halves = w.values.unflatten(-2, (2, -1))
        widened: Tensor = from_e4m3(halves, torch.float32) * _spread(w.scales, halves.shape, block)
        return widened.flatten(-3, -2)
    return from_e4m3(w.values, torch.float32) * _spread(w.scales, w.values.shape, block)


def widen_into(target: Tensor, w: Quantised, block: tuple[int, int] = KERNEL_BLOCK) -> None:
    """Writes w [rows, columns] to ``target``, in its dtype and on its device. Works in bands of
    rows, which need little extra memory.
    """
    rows = _BAND * block[0]
    for begin in range(0, len(target), rows):
        values, scales = (
            w.values[begin : begin + rows],
            w.scales[begin // block[0] : (begin + rows) // block[0]],
        )
        band = Quantised(values.to(target.device), scales.to(target.device, torch.float32))
        target[begin : begin + rows].copy_(widen_blocks(band, block))


def from_e4m3(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """The values of ``bits`` (uint8 or float8_e4m3fn) as float32 or bf16, which hold them exactly.
    NaN bits give 480.

    torch converts 0.4 G values a second on a CPU core. This moves the bits to bf16's places of
    sign, exponent and mantissa, where they read as the value x 2^-120, subnormal numbers included.
    """
    if bits.device.type != "cpu":
        return bits.view(torch.float8_e4m3fn).to(dtype)
    moved = bits.view(torch.int8).to(torch.int16).bitwise_left_shift_(4).bitwise_and_(_E4M3_IN_BF16)
    return moved.view(torch.bfloat16).mul_(2.0**120).to(dtype)


def rms_norm_fp8(x_ND: Tensor, weight_D: Tensor, eps: float) -> Quantised:
    """``norm.rms_norm``, quantised."""
    return quantise_rows(rms_norm(x_ND, weight_D, eps))


def add_rms_norm_fp8(
    x_ND: Tensor, update_ND: Tensor, weight_D: Tensor, eps: float
) -> tuple[Tensor, Quantised]:
    """``norm.add_rms_norm``: the rounded sum, and its norm, quantised."""
    total_ND = x_ND + update_ND
    return total_ND, rms_norm_fp8(total_ND, weight_D, eps)


def silu_mul_fp8(gate_up_NF: Tensor) -> Quantised:
    """``norm.silu_mul`` of [N, 2F], quantised from float32."""
    gate_NF, up_NF = gate_up_NF.float().chunk(2, -1)
    return quantise_rows(F.silu(gate_NF) * up_NF)


def linear_fp8(x: Tensor, weight_ND: Tensor, bias_N: Tensor | None, scales_GG: Tensor) -> Tensor:
    """``linear`` with a weight [N, D] in FP8 and its scales, one per 128 x 128 block. Rows of x are
    quantised first; the product is summed in float32. Returns the dtype of x.
    """
    rows = widen_rows(quantise_rows(x.reshape(-1, x.shape[-1])))
    bias = None if bias_N is None else bias_N.float()
    y_TN = F.linear(rows, widen_blocks(Quantised(weight_ND, scales_GG)), bias)
    return y_TN.to(x.dtype).view(*x.shape[:-1], len(weight_ND))


def experts_fp8(
    x: Quantised,
    pairs: tuple[Tensor, Tensor],
    w13: Quantised,
    w2: Quantised,
    counts_S: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """``experts.experts`` of quantised rows and weights; ``pairs`` is (rows_M, slots_M). Products
    are summed in float32, and the activation between them is quantised from float32. Returns y_MD
    as ``dtype``.
    """
    rows_M, slots_M = pairs
    x_ND = widen_rows(x)
    w13_SFD = widen_blocks(w13)
    w2_SDF = widen_blocks(w2)
    y_MD = x_ND.new_zeros(len(slots_M), w2_SDF.shape[1])
    for pair, (row, slot) in enumerate(zip(rows_M.tolist(), slots_M.tolist(), strict=True)):
        if slot >= 0:
            h_1F = widen_rows(silu_mul_fp8(F.linear(x_ND[row : row + 1], w13_SFD[slot])))
            y_MD[pair] = F.linear(h_1F, w2_SDF[slot])[0]
            counts_S[slot] += 1
    return y_MD.to(dtype)


def _spread(scales: Tensor, shape: torch.Size, block: tuple[int, int]) -> Tensor:
    """Expands scales to one per value of a tensor of ``shape``."""
    return scales.repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)[
        ..., : shape[-2], : shape[-1]
    ]
