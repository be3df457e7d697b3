"""Products, transpositions and conversions on vectors, with this processor's instructions and with
those of any other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lockstep.kernels.cpu.codegen import tiles as cpu_tiles, vectors as cpu_vectors
from lockstep.kernels.cpu.codegen.arrays import array
from lockstep.kernels.cpu.codegen.block_rows import write_silu_row

SUPPORT = pytest.mark.parametrize("native", [True, False])


@pytest.fixture
def compiled(native: bool, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., None]], Any]:
    if not native:
        monkeypatch.setattr(cpu_vectors, "multiplies_bf16", lambda: False)
        monkeypatch.setattr(cpu_vectors, "_scales", lambda: False)
    return numba.njit


def units(x: Tensor) -> Any:
    return array(x).view(np.uint32) if x.dtype == torch.bfloat16 else array(x)


@SUPPORT
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products(dtype: torch.dtype, compiled: Callable[[Callable[..., None]], Any]) -> None:
    a, b = torch.randn(6, 40).to(dtype), torch.randn(70, 40).to(dtype)
    b_units = np.ascontiguousarray(units(b).T)
    out, shrink = torch.randn(9, 80), torch.tensor([0.5, 1.0, 2.0, -1.0])
    before = out.clone()
    arrays = out.numpy(), shrink.numpy(), units(a), b_units

    def run(out, shrink, a, b):  # type: ignore[no-untyped-def]
        cpu_tiles.add_product(out, 5, shrink, a, 2, b, 32, 2)
        cpu_tiles.add_product(out, 0, None, a, 1, b, 3, 4)

    compiled(run)(*arrays)
    product = a.double() @ b.double().T
    expected = before.double()
    expected[5:9, 32:64] = expected[5:9, 32:64] * shrink[:, None] + product[2:6, 32:64]
    expected[0:4, 3:67] = product[1:5, 3:67]
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_transposition_and_pairs() -> None:
    rows, out = torch.randn(20, 44).bfloat16(), np.zeros((18, 20), np.uint32)

    @numba.njit
    def turn(rows, out):  # type: ignore[no-untyped-def]
        cpu_tiles.transpose(rows, None, 3, 5, out, 2, 4)

    turn(array(rows), out)
    assert (
        np.array_equal(out[2:18, 4:20], units(rows)[3:19, 5:21].T)
        and not out[:2].any()
        and not out[:, :4].any()
    )
    paired = np.zeros((2, 33), np.uint32)

    @numba.njit
    def join(rows, out):  # type: ignore[no-untyped-def]
        cpu_tiles.pair(rows, None, 7, 2, out, 1, 1)

    join(array(rows), paired)
    both = torch.from_numpy(paired.view(np.uint16)).view(torch.bfloat16)[1, 2:].view(32, 2)
    assert torch.equal(both, rows[7:9, 2:34].T) and not paired[0].any()


@SUPPORT
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_with_rows_as_they_lie(
    dtype: torch.dtype, compiled: Callable[[Callable[..., None]], Any]
) -> None:
    """The same bits as products with the laid-out rows. Those to be fetched are others."""
    per_unit = 4 // dtype.itemsize
    rows, q, shares = (
        torch.randn(90, 200).to(dtype),
        torch.randn(6, 64).to(dtype),
        torch.rand(4, 32).to(dtype),
    )
    places = np.stack([np.random.default_rng(0).permutation(90)[:40], np.arange(40)])
    ordered = rows[torch.from_numpy(places[0])].contiguous()
    turned = np.ascontiguousarray(units(ordered[5:21, 6:70].contiguous()).T)
    values = ordered[:32, 10:74].unflatten(0, (-1, per_unit)).transpose(1, 2).contiguous()
    paired = units(values)[..., 0]
    shrink, sums = torch.tensor([0.5, 1.0, 2.0, -1.0]).numpy(), torch.randn(6, 70).numpy()
    given = units(q), units(shares), array(rows), places, turned, np.ascontiguousarray(paired), shrink

    def run(q, shares, rows, places, turned, paired, shrink, scores, sums):  # type: ignore[no-untyped-def]
        cpu_tiles.multiply_turned(scores[0], q, 1, rows, places, 5, 6 * rows.itemsize // 4)
        cpu_tiles.add_paired(sums[0], 1, shrink, shares, rows, places, 10, 3)
        cpu_tiles.add_product(scores[1], 0, None, q, 1, turned, 0, 1)
        cpu_tiles.add_product(sums[1], 1, shrink, shares, 0, paired, 0, 4)

    scores, both = np.zeros((2, 4, 80), np.float32), np.stack([sums, np.roll(sums, -3, 1)])
    compiled(run)(*given, scores, both)
    assert np.array_equal(scores[0, :, 5:21], scores[1, :, :16]) and scores[1, :, :16].any()
    assert np.array_equal(both[0, 1:5, 3:67], both[1, 1:5, :64])
    assert np.array_equal(both[0, 0], sums[0]) and not np.array_equal(both[0, 1:5], sums[1:5])


@SUPPORT
@pytest.mark.parametrize("target", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("source", [torch.uint8, torch.bfloat16, torch.float32])
def test_conversions(
    source: torch.dtype, target: torch.dtype, compiled: Callable[[Callable[..., None]], Any]
) -> None:
    numbers = torch.arange(256).to(torch.uint8).view(16, 16)
    numbers = numbers if source == torch.uint8 else torch.randn(16, 16).mul(100).to(source)
    out = torch.zeros(16, 18, dtype=target)

    def run(numbers, out):  # type: ignore[no-untyped-def]
        for row in range(16):
            cpu_tiles.move(numbers, row, 0, np.float32(0.3), out, row, 2)

    compiled(run)(array(numbers), array(out))
    wide = numbers.view(torch.float8_e4m3fn).float() if source == torch.uint8 else numbers.float()
    # Never written to a cache; all bits set are read as the number they would encode.
    wide[wide.isnan()] = torch.tensor(480.0).copysign(wide[wide.isnan()])
    expected = numbers if source == target else (wide * np.float32(0.3)).to(target)
    assert torch.equal(out[:, 2:], expected) and not out[:, :2].any()


@SUPPORT
@pytest.mark.parametrize("scaled", [True, False])
def test_softmax_that_goes_on(scaled: bool, compiled: Callable[[Callable[..., None]], Any]) -> None:
    scores = torch.randn(5, 128) * 30
    scales = torch.rand(2, 64) + 0.5 if scaled else None
    scores[2, 64:], scores[3, 3:] = -torch.inf, -torch.inf
    best, sums, shrink = torch.full((5,), -torch.inf), torch.zeros(5), torch.empty(4)
    shares = torch.empty(4, 64, dtype=torch.bfloat16)
    kept = []

    def run(scores, scales, best, sums, shares, shrink):  # type: ignore[no-untyped-def]
        cpu_tiles.soften(scores, 0, np.float32(0.25), scales, best, sums, 1, shares, shrink)

    step, numbers = compiled(run), None if scales is None else scales.numpy()
    if scales is not None:
        scales[0, 2] = torch.nan  # a position that no row sees
        scores[:, [2, 66]] = -torch.inf
    for half in range(2):
        part = scores[1:, 64 * half : 64 * half + 64].contiguous().numpy()
        step(part, numbers, best.numpy(), sums.numpy(), array(shares), shrink.numpy())
        kept = [part * shrink[:, None] for part in kept] + [
            shares.double() / (1 if scales is None else scales[1])
        ]
    if scales is not None:
        scores = torch.where(scores.isinf(), scores, scores * scales[0].repeat(2))
    powers = torch.exp2((scores[1:].double() - scores[1:].double().amax(-1, keepdim=True)) * 0.25)
    assert torch.equal(best[1:], scores[1:].amax(-1)) and best[0] == -torch.inf
    torch.testing.assert_close(sums[1:].double(), powers.sum(-1), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(torch.cat(kept, 1), powers, rtol=5e-3, atol=1e-30)


@SUPPORT
def test_silu_of_a_row_of_sums(compiled: Callable[[Callable[..., None]], Any]) -> None:
    """Also where e^x is not a float32."""
    sums, out = torch.randn(3, 64) * 4, torch.zeros(5, 48, dtype=torch.bfloat16)
    sums[1, :6] = torch.tensor([0.0, -0.0, 90.0, -90.0, 1e4, -1e4])
    sums[2, 3] = torch.nan

    def run(sums, out):  # type: ignore[no-untyped-def]
        for row in range(3):
            write_silu_row(sums, row, out, row + 1, 16, 32)

    compiled(run)(sums.numpy(), array(out))
    expected = F.silu(sums[:, :32].double()) * sums[:, 32:].double()
    torch.testing.assert_close(out[1:4, 16:].double(), expected, rtol=2**-8, atol=1e-30, equal_nan=True)
    assert not out[0].any() and not out[4].any() and not out[:, :16].any()
