"""Experts against their definition, pair by pair; the sum that joins their outputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lockstep.kernels.experts import experts, experts_reference, weighted_sum


def _weights(slots: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    w13 = torch.randn(slots, 2 * 12, 16, generator=generator) * 0.25
    return w13.to(dtype), (torch.randn(slots, 16, 12, generator=generator) * 0.25).to(dtype)


CASES = {
    "spread": [3, 0, 1, 3, 2, 2, 0, 3],
    "one slot": [1] * 8,
    "padding": [-1, 2, -1, 0, 0, -1, 3, -1],
    "only padding": [-1] * 8,
    "none": [],
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_definition(case: str, dtype: torch.dtype) -> None:
    slots = torch.tensor(CASES[case], dtype=torch.int64)
    rows = torch.randint(0, 5, (len(slots),), generator=torch.Generator().manual_seed(3))
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(4)).to(dtype)
    w13, w2 = _weights(4, dtype)
    counts, expected_counts = torch.ones(4, dtype=torch.int64), torch.ones(4, dtype=torch.int64)
    y = experts(x, rows, slots, w13, w2, counts)
    expected = experts_reference(x, rows, slots, w13, w2, expected_counts)
    torch.testing.assert_close(y, expected)
    assert (y[slots < 0] == 0).all() and y.dtype == dtype
    assert torch.equal(counts, expected_counts) and int(counts.sum()) == 4 + int((slots >= 0).sum())


def test_weighted_sum_is_in_order_of_k_and_float32() -> None:
    y = torch.tensor([[[2.0**25], [1.0], [-(2.0**25)]]])
    assert weighted_sum(y, torch.ones(1, 3)).item() == 0.0  # the 1 is lost in float32 only if it is added second
    assert weighted_sum(y[:, [0, 2, 1]], torch.ones(1, 3)).item() == 1.0
    half = torch.full((1, 3, 1), 1.0, dtype=torch.bfloat16)
    assert weighted_sum(half, torch.tensor([[1.0, 2**-9, 2**-9]])).item() == 1.0 + 2**-8 - 2**-8  # rounded once, at the end
    assert weighted_sum(half, torch.tensor([[1.0, 2**-8, 2**-8]])).item() == 1.0 + 2**-7


def test_weighted_sum_of_a_token_does_not_depend_on_the_others() -> None:
    generator = torch.Generator().manual_seed(5)
    for dtype in (torch.float32, torch.bfloat16):
        y, weights = torch.randn(37, 8, 100, generator=generator).to(dtype), torch.rand(37, 8, generator=generator)
        whole = weighted_sum(y, weights)
        for start, stop in ((0, 1), (5, 7), (20, 37)):
            assert torch.equal(weighted_sum(y[start:stop], weights[start:stop]), whole[start:stop])
    assert weighted_sum(torch.zeros(0, 8, 16), torch.zeros(0, 8)).shape == (0, 16)
