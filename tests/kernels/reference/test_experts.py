"""Experts against their definition, pair by pair; the weighted sum of their outputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lockstep.kernels.activation import SILU, Activation
from lockstep.kernels.cpu.codegen import crew
from lockstep.kernels.cpu.experts import experts, weighted_sum
from lockstep.kernels.cpu.linear import pack_for_onednn, pack_slots
from lockstep.kernels.reference.experts import ExpertForm, experts_reference


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
    # In bf16 the definition rounds SiLU, the CPU only rounds the product.
    tolerance = 1e-7 if dtype == torch.float64 else 1e-2
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    assert (y[slots < 0] == 0).all() and y.dtype == dtype
    assert torch.equal(counts, expected_counts) and int(counts.sum()) == 4 + int((slots >= 0).sum())


def test_the_clamped_activation_and_biases_equal_their_definition() -> None:
    generator = torch.Generator().manual_seed(6)
    w13, w2 = torch.randn(2, 6, 4, generator=generator).double(), torch.randn(2, 4, 3, generator=generator)
    b13, b2 = torch.randn(2, 6, generator=generator).double(), torch.randn(2, 4, generator=generator)
    w2, b2, x = w2.double(), b2.double(), torch.randn(1, 4, generator=generator).double() * 2
    form = ExpertForm(Activation("clamped", alpha=1.7, limit=1.25), (b13, b2))
    counts, one = torch.zeros(2, dtype=torch.int64), torch.tensor([1])
    found = experts_reference(x, torch.tensor([0]), one, w13, w2, counts, form)
    expected = b2[1].tolist()
    clamped = 0
    for f in range(3):
        gate, up = (
            float(b13[1, row]) + sum(float(a * b) for a, b in zip(w13[1, row], x[0], strict=True))
            for row in (f, f + 3)
        )
        clamped += (gate > 1.25) + (abs(up) > 1.25)
        gate, up = min(gate, 1.25), min(max(up, -1.25), 1.25)
        inner = gate / (1 + math.exp(-1.7 * gate)) * (up + 1)
        expected = [y + inner * float(w2[1, d, f]) for d, y in enumerate(expected)]
    assert found[0].tolist() == pytest.approx(expected, rel=1e-9) and clamped


def test_weighted_sum_is_in_order_of_k_and_float32() -> None:
    y = torch.tensor([[[2.0**25], [1.0], [-(2.0**25)]]])
    # The 1 is lost in float32 only if it is added second.
    assert weighted_sum(y, torch.ones(1, 3)).item() == 0.0
    assert weighted_sum(y[:, [0, 2, 1]], torch.ones(1, 3)).item() == 1.0
    half = torch.full((1, 3, 1), 1.0, dtype=torch.bfloat16)
    # Rounded once, at the end.
    assert weighted_sum(half, torch.tensor([[1.0, 2**-9, 2**-9]])).item() == 1.0 + 2**-8 - 2**-8
    assert weighted_sum(half, torch.tensor([[1.0, 2**-8, 2**-8]])).item() == 1.0 + 2**-7


def test_weighted_sum_of_a_token_does_not_depend_on_the_others() -> None:
    generator = torch.Generator().manual_seed(5)
    for dtype in (torch.float32, torch.bfloat16):
        y, weights = (
            torch.randn(37, 8, 1000, generator=generator).to(dtype),
            torch.rand(37, 8, generator=generator),
        )
        whole = weighted_sum(y, weights)
        for start, stop in ((0, 1), (5, 7), (20, 37)):
            assert torch.equal(weighted_sum(y[start:stop], weights[start:stop]), whole[start:stop])
    assert weighted_sum(torch.zeros(0, 8, 16), torch.zeros(0, 8)).shape == (0, 16)


def _one_by_one(w13: Tensor, w2: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """As oneDNN holds them, where it computes in bf16."""
    return [pack_for_onednn(slot) for slot in w13], [pack_for_onednn(slot) for slot in w2]


def _as_loaded(w13: Tensor, w2: Tensor) -> tuple[Tensor, Tensor]:
    return w13, w2


PACKINGS = [pack_slots, _one_by_one, _as_loaded]
Packing = Callable[[Tensor, Tensor], tuple[Any, Any]]


BIASES = (
    torch.randn(5, 160, generator=torch.Generator().manual_seed(8)).bfloat16(),
    torch.randn(5, 96, generator=torch.Generator().manual_seed(9)).bfloat16(),
)
FORMS = {
    "plain": ExpertForm(),
    "biases": ExpertForm(SILU, BIASES),
    "clamped": ExpertForm(Activation("clamped", 1.702, 0.5)),
    "gpt-oss": ExpertForm(Activation("clamped", 1.702, 1.5), BIASES),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("num_tokens", [1, 3, 9, 40, 300])
def test_packed_weights_give_the_same_for_few_rows_and_for_many(
    num_tokens: int, packing: Packing, form: ExpertForm
) -> None:
    """All forms agree within bf16 rounding."""
    x, rows, slots, w13, w2 = _drawn(num_tokens)
    counts, expected_counts = torch.zeros(5, dtype=torch.int64), torch.zeros(5, dtype=torch.int64)
    y = experts(x, rows, slots, *packing(w13, w2), counts, form)
    exact = ExpertForm(
        form.activation, None if form.biases is None else (form.biases[0].double(), form.biases[1].double())
    )
    expected = experts_reference(x.double(), rows, slots, w13.double(), w2.double(), expected_counts, exact)
    torch.testing.assert_close(y.double(), expected, rtol=0.02, atol=0.02)
    assert (y[slots < 0] == 0).all() and torch.equal(counts, expected_counts)


@pytest.mark.parametrize("packing", PACKINGS)
def test_padding_only_with_packed_weights(packing: Packing) -> None:
    _, _, _, w13, w2 = _drawn(1)
    counts = torch.zeros(5, dtype=torch.int64)
    none = torch.tensor([-1, -1])
    assert not experts(
        torch.ones(2, 96).bfloat16(), torch.tensor([0, 1]), none, *packing(w13, w2), counts
    ).any()
    assert experts(torch.ones(2, 96).bfloat16(), none[:0], none[:0], *packing(w13, w2), counts).shape == (
        0,
        96,
    )
    assert not counts.any()


def test_a_pair_in_blocks_does_not_depend_on_the_pairs_beside_it() -> None:
    x, rows, slots, w13, w2 = _drawn(150)
    weights = pack_slots(w13, w2)
    wide = torch.zeros(150, 100).bfloat16()
    wide[:, 2:98] = x  # strided rows, as they arrive from other ranks
    whole = experts(wide[:, 2:98], rows, slots, *weights, torch.zeros(5, dtype=torch.int64))
    for count in (1, 2, 7, 50, 449):
        some = torch.randperm(450, generator=torch.Generator().manual_seed(count))[:count]
        assert torch.equal(
            experts(x, rows[some], slots[some], *weights, torch.zeros(5, dtype=torch.int64)), whole[some]
        )


def test_threads_share_the_work_in_blocks_and_change_nothing() -> None:
    x, rows, slots, w13, w2 = _drawn(150)
    weights, before, results = pack_slots(w13, w2), crew.num_threads(), []
    try:
        for threads in (1, 3):
            crew.set_num_threads(threads)
            results.append(experts(x, rows, slots, *weights, torch.zeros(5, dtype=torch.int64)))
    finally:
        crew.set_num_threads(before)
    assert torch.equal(results[0], results[-1])


def _drawn(num_tokens: int) -> tuple[Tensor, ...]:
    """x, rows, slots, w13 and w2 of 5 slots, with 3 pairs per token, some of them padding. Panels
    of blocks are not full.
    """
    generator = torch.Generator().manual_seed(num_tokens)
    w13 = (torch.randn(5, 2 * 80, 96, generator=generator) * 0.1).bfloat16()
    w2 = (torch.randn(5, 96, 80, generator=generator) * 0.1).bfloat16()
    x = torch.randn(num_tokens, 96, generator=generator).bfloat16()
    slots = torch.randint(-1, 5, (3 * num_tokens,), generator=generator)
    return x, torch.arange(num_tokens).repeat_interleave(3), slots, w13, w2
