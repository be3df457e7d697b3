"""The Triton experts against their definition, pair by pair."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lockstep.kernels.activation import SILU, Activation
from lockstep.kernels.reference import experts as reference
from lockstep.kernels.triton.experts import experts, experts_tiled, weighted_sum
from lockstep.kernels.triton.tiles import DEFAULT, ExpertTile, ProductTile
from support.grids import pairwise
from support.kernels.poison import DEVICE, poisoned

CASES = {
    "spread": [3, 0, 1, 3, 2, 2, 0, 3],
    "one slot, more than a block": [1] * 37,
    "padding": [-1, 2, -1, 0, 0, -1, 3, -1],
    "only padding": [-1] * 8,
    "none": [],
}
# Hidden, width: whole tiles, and tails in every dimension.
SIZES = [(128, 64), (40, 24), (72, 130)]
# The interpreter truncates bf16 instead of rounding it, and the intermediate is stored in it.
DTYPES = [(torch.float32, 1e-5), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)]
SMALL = ExpertTile(
    0,
    16,
    ProductTile(columns=32, depth=32, warps=4, stages=2),
    ProductTile(columns=16, depth=32, warps=4, stages=2),
)


def weights(hidden: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    w13 = torch.randn(4, 2 * width, hidden, generator=generator) * hidden**-0.5
    w2 = torch.randn(4, hidden, width, generator=generator) * width**-0.5
    return w13.to(DEVICE, dtype), w2.to(DEVICE, dtype)


def formed(name: str, hidden: int, width: int, dtype: torch.dtype) -> reference.ExpertForm:
    """A form of FORMS for four slots."""
    generator = torch.Generator().manual_seed(5)
    biases = [torch.randn(4, n, generator=generator).to(DEVICE, dtype) for n in (2 * width, hidden)]
    activation = Activation("clamped", 1.702, 1.25) if "clamped" in name else SILU
    return reference.ExpertForm(activation, (biases[0], biases[1]) if "biases" in name else None)


FORMS = ["plain", "biases", "clamped", "clamped, biases"]


@pairwise({"case": CASES, "hidden, width": SIZES, "form": FORMS, "dtype, tolerance": DTYPES})
def test_equals_the_definition(
    case: str, hidden: int, width: int, form: str, dtype: torch.dtype, tolerance: float
) -> None:
    slots = torch.tensor(CASES[case], dtype=torch.int64, device=DEVICE)
    rows = torch.randint(0, 5, (len(slots),), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    x = torch.randn(5, hidden, generator=torch.Generator().manual_seed(4)).to(DEVICE, dtype)
    w13, w2 = weights(hidden, width, dtype)
    counts, expected_counts = (torch.ones(4, dtype=torch.int64, device=DEVICE) for _ in range(2))
    own = formed(form, hidden, width, dtype)
    with poisoned():
        y = experts_tiled(x, (rows, slots), (w13, w2), counts, SMALL, own)
    expected = reference.experts_reference(x, rows, slots, w13, w2, expected_counts, own)
    assert y.dtype == dtype and y.shape == expected.shape
    real = slots >= 0
    torch.testing.assert_close(y[real], expected[real], rtol=tolerance, atol=tolerance)
    assert torch.equal(counts, expected_counts)


@pytest.mark.parametrize("num_pairs", [8, 24 * 3, 65 * 3])
def test_default_tiles_and_rows_that_are_views(num_pairs: int) -> None:
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(9, 100, generator=generator).to(DEVICE)[:, 10:58]
    rows = torch.randint(0, 9, (num_pairs,), generator=generator).to(DEVICE)
    slots = torch.randint(-1, 3, (num_pairs,), generator=generator).to(DEVICE)
    w13, w2 = (torch.randn(3, *shape, generator=generator).to(DEVICE) * 0.2 for shape in ((48, 48), (48, 24)))
    results = []
    for column in (reference.experts_reference, experts):
        counts = torch.zeros(3, dtype=torch.int64, device=DEVICE)
        results.append((column(x, rows, slots, w13, w2, counts), counts))
    results = [(y[slots >= 0], counts) for y, counts in results]
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_larger_groups_get_larger_tiles() -> None:
    assert [DEFAULT.of_experts(pairs, 8).rows for pairs in (8, 128, 129, 512, 513)] == [16, 16, 64, 64, 128]


def test_padding_in_a_block_is_never_multiplied() -> None:
    """A pair's result is the same beside pairs whose rows hold NaN."""
    w13, w2 = weights(40, 24, torch.float32)
    x = torch.randn(3, 40, device=DEVICE)
    x[2] = float("nan")
    rows, slots = torch.tensor([0, 2, 1], device=DEVICE), torch.tensor([1, 1, 1], device=DEVICE)
    y = experts_tiled(x, (rows, slots), (w13, w2), torch.zeros(4, dtype=torch.int64, device=DEVICE), SMALL)
    assert y[[0, 2]].isfinite().all() and y[1].isnan().all()


def test_float64_is_refused() -> None:
    with pytest.raises(ValueError, match=r"experts: x: .*float64; allowed: torch.float32"):
        experts(
            torch.zeros(1, 8, dtype=torch.float64),
            torch.zeros(1, dtype=torch.int64),
            torch.zeros(1, dtype=torch.int64),
            torch.zeros(1, 8, 8, dtype=torch.float64),
            torch.zeros(1, 8, 4, dtype=torch.float64),
            torch.zeros(1, dtype=torch.int64),
        )


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 1e-2)]
)
@pytest.mark.parametrize("shape", [(0, 8, 16), (1, 1, 5), (7, 8, 100), (2, 3, 1500)])
def test_weighted_sum_equals_the_reference(
    shape: tuple[int, int, int], dtype: torch.dtype, tolerance: float
) -> None:
    generator = torch.Generator().manual_seed(5)
    y, scales = (
        torch.randn(shape, generator=generator).to(DEVICE, dtype),
        torch.rand(shape[:2], generator=generator).to(DEVICE),
    )
    with poisoned():
        out = weighted_sum(y, scales)
    assert out.dtype == dtype
    torch.testing.assert_close(out, reference.weighted_sum(y, scales), rtol=tolerance, atol=tolerance)


def test_outputs_without_a_weight_are_not_read_and_rows_without_any_are_left() -> None:
    y, weights = torch.ones(3, 2, 8, device=DEVICE), torch.tensor([[0.5, 0.0], [0.0, 0.0], [2.0, 1.0]])
    y[weights == 0] = float("nan")
    weights, room = weights.to(DEVICE), torch.full((3, 20), 7.0, device=DEVICE)
    assert weighted_sum(y, weights).tolist() == [[0.5] * 8, [0.0] * 8, [3.0] * 8]
    weighted_sum(y, weights, room[:, 4:12])
    assert room.tolist() == [[7.0] * 4 + [value] * 8 + [7.0] * 8 for value in (0.5, 7.0, 3.0)]


def test_weighted_sum_is_in_order_of_k() -> None:
    y = torch.tensor([[[2.0**25], [1.0], [-(2.0**25)]]], device=DEVICE)
    ones = torch.ones(1, 3, device=DEVICE)
    assert weighted_sum(y, ones).item() == 0.0
    assert weighted_sum(y[:, [0, 2, 1]].contiguous(), ones).item() == 1.0
