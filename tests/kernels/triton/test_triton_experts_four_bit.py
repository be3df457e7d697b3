"""Experts in 4 bits in Triton: equal to those of the dequantised weights."""

from __future__ import annotations

import pytest
import torch

from lockstep.kernels.activation import Activation
from lockstep.kernels.formats.four_bit_format import INT4, INT4_FP16, MXFP4, NVFP4, FourBitFormat
from lockstep.kernels.reference import four_bit as reference
from lockstep.kernels.reference.experts import ExpertForm
from lockstep.kernels.reference.four_bit import FourBit, quantise
from lockstep.kernels.triton.experts_four_bit import experts_four_bit_tiled
from lockstep.kernels.triton.tiles import ExpertTile, ProductTile
from support.kernels.poison import DEVICE, poisoned

FORMATS = {"int4": INT4, "int4 in fp16": INT4_FP16, "mxfp4": MXFP4, "nvfp4": NVFP4}
CASES = {
    "spread": [3, 0, 1, 3, 2, 2, 0, 3],
    "one slot, more than a block": [1] * 20,
    "padding": [-1, 2, -1, 0, 0, -1, 3, -1],
    "none": [],
}


def on_device(w: FourBit) -> FourBit:
    factors = None if w.factors is None else w.factors.to(DEVICE)
    return FourBit(w.format, w.codes.to(DEVICE), w.scales.to(DEVICE), factors)


def weights(format: FourBitFormat, hidden: int, width: int) -> tuple[FourBit, FourBit]:
    generator = torch.Generator().manual_seed(2)
    w13 = torch.randn(4, 2 * width, hidden, generator=generator) * hidden**-0.5
    w13 *= 2.0 ** torch.randint(-2, 3, (4, 2 * width, 1), generator=generator)
    w2 = torch.randn(4, hidden, width, generator=generator) * width**-0.5
    return on_device(quantise(w13, format, parts=2)), on_device(quantise(w2, format))


def formed(name: str, hidden: int, width: int, dtype: torch.dtype) -> ExpertForm:
    if name == "plain":
        return ExpertForm()
    generator = torch.Generator().manual_seed(5)
    up, down = (torch.randn(4, n, generator=generator).to(DEVICE, dtype) for n in (2 * width, hidden))
    return ExpertForm(Activation("clamped", 1.702, 1.25), (up, down))


@pytest.mark.parametrize("form", ["plain", "clamped, biases"])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    ("case", "sizes", "dtype"),
    [
        ("spread", (128, 64), torch.bfloat16),
        ("padding", (144, 40), torch.float32),
        ("one slot, more than a block", (96, 72), torch.bfloat16),
        ("none", (96, 72), torch.float32),
    ],
)
def test_experts(name: str, case: str, sizes: tuple[int, int], dtype: torch.dtype, form: str) -> None:
    slots = torch.tensor(CASES[case], dtype=torch.int64, device=DEVICE)
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(0, 5, (len(slots),), generator=generator).to(DEVICE)
    x = torch.randn(5, sizes[0], generator=generator).to(DEVICE, dtype)
    w13, w2 = weights(FORMATS[name], *sizes)
    counts, expected_counts = (torch.ones(4, dtype=torch.int64, device=DEVICE) for _ in range(2))
    tile = ExpertTile(0, 16, ProductTile(32, 64, 4, 2), ProductTile(64, 128, 4, 2))
    own = formed(form, *sizes, dtype)
    with poisoned():
        y = experts_four_bit_tiled(x, (rows, slots), (w13, w2), counts, tile, own)
    expected = reference.experts_four_bit(x, rows, slots, w13, w2, expected_counts, own)
    assert y.dtype == dtype and torch.equal(counts, expected_counts)
    y, expected = y[slots >= 0], expected[slots >= 0]
    error = (y.float() - expected.float()).norm(dim=-1) / expected.float().norm(dim=-1).clamp_min(1e-6)
    assert (error < (0.02 if dtype == torch.bfloat16 else 1e-5)).all()
