"""The Triton gate against the reference, rule by rule."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lockstep.kernels.reference import gate as reference
from lockstep.kernels.reference.gate import Routing
from lockstep.kernels.triton import gate as triton_gate
from support.grids import pairwise
from support.kernels.poison import DEVICE, poisoned

# Experts, rule. The odd sizes pad every power of two.
RULES = {
    "softmax": (16, Routing(top_k=4)),
    "softmax, plain weights": (24, Routing(top_k=3, normalise=False)),
    "sigmoid": (16, Routing(top_k=3, scoring="sigmoid", scale=2.5)),
    "groups": (32, Routing(top_k=4, scoring="sigmoid", num_groups=4, top_groups=2, scale=2.5)),
    "three odd groups": (15, Routing(top_k=5, scoring="sigmoid", num_groups=3, top_groups=2)),
    "groups of one": (16, Routing(top_k=2, scoring="sigmoid", num_groups=16, top_groups=3)),
    "all groups": (16, Routing(top_k=4, scoring="sigmoid", num_groups=4, top_groups=4)),
    "softmax groups": (16, Routing(top_k=2, num_groups=2, top_groups=1)),
    "groups by their best": (
        30,
        Routing(top_k=3, normalise=False, scale=16.0, num_groups=5, top_groups=2, group_quality="best"),
    ),
    "bias of the logits": (32, Routing(top_k=4, logit_bias=True)),
    "one expert": (1, Routing(top_k=1)),
    "Qwen3-30B-A3B": (128, Routing(top_k=8)),
    "DeepSeek-V2": (
        160,
        Routing(6, normalise=False, scale=16.0, num_groups=8, top_groups=3, group_quality="best"),
    ),
    "DeepSeek-V3": (256, Routing(top_k=8, scoring="sigmoid", num_groups=8, top_groups=4, scale=2.5)),
}
TOKENS, HIDDEN = 13, 24


def inputs(num_experts: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, HIDDEN, generator=generator).to(DEVICE, dtype)
    weight = torch.randn(num_experts, HIDDEN, generator=generator) * 0.4
    return x, weight.to(DEVICE), (torch.randn(num_experts, generator=generator) * 0.3).to(DEVICE)


@pairwise(
    {"name": RULES, "with_bias": [False, True], "dtype": [torch.float32, torch.float16, torch.bfloat16]}
)
def test_equals_the_reference(name: str, with_bias: bool, dtype: torch.dtype) -> None:
    num_experts, rule = RULES[name]
    x, weight, bias = inputs(num_experts, dtype)
    expected_ids, expected = reference.gate(x, weight, bias if with_bias else None, rule)
    with poisoned():
        ids, weights = triton_gate.gate(x, weight, bias if with_bias else None, rule)
    assert ids.dtype == torch.int64 and weights.dtype == torch.float32
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-7)


def test_all_tokens_to_one_expert_and_none_to_the_rest() -> None:
    x, weight, bias = inputs(16)
    bias[:] = 0
    bias[11] = 10
    ids, weights = triton_gate.gate(x, weight, bias, Routing(top_k=1, scoring="sigmoid", normalise=False))
    assert (ids == 11).all()
    torch.testing.assert_close(weights[:, 0], (x @ weight[11]).sigmoid())


def test_equal_choices_go_to_the_lower_expert() -> None:
    ids, _ = triton_gate.choose(torch.zeros(3, 16, device=DEVICE), None, Routing(top_k=3))
    assert ids.tolist() == [[0, 1, 2]] * 3


def test_no_tokens() -> None:
    ids, weights = triton_gate.gate(
        torch.zeros(0, 24, device=DEVICE), torch.zeros(16, 24, device=DEVICE), None, Routing(top_k=2)
    )
    assert ids.shape == weights.shape == (0, 2)


def summed_in_blocks(x_TD: Tensor, weight_DE: Tensor, out_dtype: torch.dtype) -> Tensor:
    """``torch.mm`` as matrix units compute it: exact products of numbers in 16 bits, summed in
    float32 in another order, 64 at a time.
    """
    assert x_TD.dtype == weight_DE.dtype == torch.bfloat16 and out_dtype == torch.float32
    assert x_TD.stride(1) == 1 and weight_DE.stride(0) == 1, "both read along D, as they lie"
    sums_TE = torch.zeros(len(x_TD), weight_DE.shape[1])
    for x, weight in zip(x_TD.split(64, 1), weight_DE.split(64, 0), strict=True):
        sums_TE += x.float() @ weight.float()
    return sums_TE


@pytest.mark.skipif(DEVICE == "cuda", reason="a double of the product on a card")
@pytest.mark.parametrize(
    ("hidden", "num_experts", "rule"),
    [
        (2048, 128, RULES["Qwen3-30B-A3B"][1]),
        (7168, 256, RULES["DeepSeek-V3"][1]),
        (7168, 384, Routing(top_k=8, scoring="sigmoid", scale=2.827)),  # Kimi K2
    ],
    ids=["Qwen3-30B-A3B", "DeepSeek-V3", "Kimi K2"],
)
def test_weights_in_bf16_choose_as_the_widened_ones_do(
    hidden: int, num_experts: int, rule: Routing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token whose choice differs has a tie, within the rounding of sums. Of 512 none does here,
    or one.
    """
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(512, hidden, generator=generator).bfloat16()
    weight = (torch.randn(num_experts, hidden, generator=generator) * hidden**-0.5).bfloat16()
    bias = torch.randn(num_experts, generator=generator) * 0.02 if rule.scoring == "sigmoid" else None
    wanted_ids, wanted = reference.gate(x, weight.float(), bias, rule)
    monkeypatch.setattr(triton_gate, "interpreted", lambda: False)
    monkeypatch.setattr(torch, "mm", summed_in_blocks)
    logits = triton_gate._logits(x, weight)
    exact = x.double() @ weight.double().T
    assert (logits - exact).abs().max() < 4e-6 and (logits != x.float() @ weight.float().T).any()
    ids, weights = triton_gate.gate(x, weight, bias, rule)
    same = (ids.sort(1).values == wanted_ids.sort(1).values).all(1)
    torch.testing.assert_close(
        weights.sort(1).values[same], wanted.sort(1).values[same], rtol=1e-5, atol=1e-7
    )
    exact_scores = exact.softmax(-1) if rule.scoring == "softmax" else exact.sigmoid()
    choice = exact_scores if bias is None else exact_scores + bias
    for token in (~same).nonzero()[:, 0].tolist():
        edge = choice[token, [*set(ids[token].tolist()) ^ set(wanted_ids[token].tolist())]]
        assert edge.max() - edge.min() < 1e-6, "no tie"
    assert same.sum() >= len(same) - 1


def test_the_product_in_bf16_is_one_of_torch() -> None:
    """Types and shapes, on tensors without memory."""
    x, weight = (torch.empty(rows, 64, dtype=torch.bfloat16, device="meta") for rows in (5, 16))
    logits = torch.mm(x, weight.t(), out_dtype=torch.float32)
    assert logits.shape == (5, 16) and logits.dtype == torch.float32


@pairwise({"name": RULES, "dtype": [torch.float16, torch.bfloat16]})
def test_narrow_weights_equal_the_reference(name: str, dtype: torch.dtype) -> None:
    num_experts, rule = RULES[name]
    x, weight, bias = inputs(num_experts, dtype)
    expected_ids, expected = reference.gate(x, weight.to(dtype).float(), bias, rule)
    with poisoned():
        ids, weights = triton_gate.gate(x, weight.to(dtype), bias, rule)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-7)
