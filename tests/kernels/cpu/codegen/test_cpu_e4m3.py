"""Bytes of e4m3 laid out for products: every value, and the scales beside them."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from lockstep.kernels.cpu.codegen import e4m3 as cpu_e4m3
from lockstep.kernels.reference.fp8 import from_e4m3

NEEDS_VBMI = pytest.mark.skipif(
    not cpu_e4m3.decodes(),
    reason="without AVX512-VBMI and AVX512-BF16 entries are converted by other kernels",
)
ROWS = np.random.default_rng(0).permutation(40)[:20]
PLACES = np.stack([ROWS, ROWS[::-1]])  # the second are fetched


def entries() -> Tensor:
    """Every byte value in every column of 40 rows."""
    return ((torch.arange(40)[:, None] * 37 + torch.arange(160) * 11) % 256).to(torch.uint8)


def halves(units: NDArray[Any]) -> Tensor:
    return torch.from_numpy(units.view(np.uint16)).view(torch.bfloat16).view(*units.shape, 2)


@NEEDS_VBMI
@pytest.mark.parametrize("column", [0, 3, 96])
def test_keys_are_turned(column: int) -> None:
    @numba.njit
    def run(entries, places, column, out):  # type: ignore[no-untyped-def]
        cpu_e4m3.turn_bytes(entries, places, 2, column, out, 1, 2)

    out = np.zeros((34, 20), np.uint32)
    run(entries().numpy(), PLACES, column, out)
    expected = from_e4m3(entries()[ROWS[2:18], column : column + 64], torch.bfloat16)
    assert torch.equal(halves(out)[1:33, 2:18].permute(1, 0, 2).reshape(16, 64), expected)
    assert not out[[0, 33]].any() and not out[:, :2].any() and not out[:, 18:].any()


@NEEDS_VBMI
@pytest.mark.parametrize("column", [0, 3, 96])
def test_values_are_paired(column: int) -> None:
    @numba.njit
    def run(entries, places, column, out):  # type: ignore[no-untyped-def]
        cpu_e4m3.pair_bytes(entries, places, 4, column, out, 1, 2)

    out = np.zeros((3, 68), np.uint32)
    run(entries().numpy(), PLACES, column, out)
    expected = from_e4m3(entries()[ROWS[4:6], column : column + 64], torch.bfloat16)
    assert torch.equal(halves(out)[1, 2:66].T, expected)
    assert not out[[0, 2]].any() and not out[1, :2].any() and not out[1, 66:].any()


@NEEDS_VBMI
def test_every_value_is_decoded() -> None:
    @numba.njit
    def run(entries, places, out):  # type: ignore[no-untyped-def]
        for column in range(0, 256, 64):
            cpu_e4m3.pair_bytes(entries, places, 0, column, out, 0, column)

    values, out = torch.arange(256).to(torch.uint8), np.zeros((1, 256), np.uint32)
    run(torch.stack([values, values.flip(0)]).numpy(), np.arange(4).reshape(2, 2) % 2, out)
    assert torch.equal(halves(out)[0, :, 0], from_e4m3(values, torch.bfloat16))
    assert torch.equal(halves(out)[0, :, 1], from_e4m3(values.flip(0), torch.bfloat16))


def test_scales_are_found() -> None:
    @numba.njit
    def run(entries, places, out):  # type: ignore[no-untyped-def]
        cpu_e4m3.take_scales(entries, places, 7, out, 1)

    scales, out = torch.randn(40, 40), np.zeros((2, 20), np.float32)
    run(scales.view(torch.uint8).numpy(), PLACES, out)
    assert np.array_equal(out[1], scales.numpy()[ROWS, 7]) and not out[0].any()
