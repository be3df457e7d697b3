"""The compiled gate against the reference, rule by rule, and its independence of the batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lockstep.kernels.cpu import gate as cpu_gate
from lockstep.kernels.reference import gate as reference
from lockstep.kernels.reference.gate import Routing
from support.grids import pairwise

# Experts, rule. A number of experts that is not a multiple of four takes another product.
RULES = {
    "softmax": (16, Routing(top_k=4)),
    "softmax, plain weights": (23, Routing(top_k=3, normalise=False)),
    "sigmoid": (18, Routing(top_k=3, scoring="sigmoid", scale=2.5)),
    "groups": (32, Routing(top_k=4, scoring="sigmoid", num_groups=4, top_groups=2, scale=2.5)),
    "three odd groups": (15, Routing(top_k=5, scoring="sigmoid", num_groups=3, top_groups=2)),
    "groups of one": (16, Routing(top_k=2, scoring="sigmoid", num_groups=16, top_groups=3)),
    "all groups": (16, Routing(top_k=4, scoring="sigmoid", num_groups=4, top_groups=4)),
    "groups by their best": (
        30,
        Routing(top_k=3, normalise=False, scale=16.0, num_groups=5, top_groups=2, group_quality="best"),
    ),
    "bias of the logits": (32, Routing(top_k=4, logit_bias=True)),
    "one expert": (1, Routing(top_k=1)),
    "DeepSeek-V3": (256, Routing(top_k=8, scoring="sigmoid", num_groups=8, top_groups=4, scale=2.5)),
}
TOKENS, HIDDEN = 37, 48


def _inputs(
    num_experts: int, dtype: torch.dtype, tokens: int = TOKENS, hidden: int = HIDDEN
) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, hidden, generator=draw).to(dtype)
    return (
        x,
        torch.randn(num_experts, hidden, generator=draw) * 0.3,
        torch.randn(num_experts, generator=draw) * 0.3,
    )


@pairwise(
    {"name": RULES, "with_bias": [False, True], "dtype": [torch.float32, torch.bfloat16, torch.float16]}
)
def test_as_the_reference(name: str, with_bias: bool, dtype: torch.dtype) -> None:
    num_experts, rule = RULES[name]
    x, weight, bias = _inputs(num_experts, dtype)
    expected_ids, expected = reference.gate(x, weight, bias if with_bias else None, rule)
    ids, weights = cpu_gate.gate(x, weight, bias if with_bias else None, rule)
    assert ids.dtype == torch.int64 and weights.dtype == torch.float32
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected, rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_experts", [32, 35])
def test_a_token_is_routed_the_same_alone_and_among_others(num_experts: int, dtype: torch.dtype) -> None:
    """Equal to the bit, on one thread and on several: 100 tokens of 1000 values are shared among
    threads, a few tokens are not.
    """
    x, weight, _ = _inputs(num_experts, dtype, tokens=100, hidden=1000)
    ids, weights = cpu_gate.gate(x, weight, None, Routing(top_k=4))
    for start, end in ((0, 1), (1, 3), (5, 9), (16, 17), (90, 100)):
        own_ids, own_weights = cpu_gate.gate(x[start:end], weight, None, Routing(top_k=4))
        assert torch.equal(own_ids, ids[start:end]) and torch.equal(own_weights, weights[start:end])


def test_scores_at_the_ends() -> None:
    """Logits far apart: a softmax of one and zeros; sigmoids of one and zeros, with no division by
    a zero sum.
    """
    weight = torch.eye(4)
    ids, weights = cpu_gate.gate(torch.tensor([[500.0, -500.0, 0.0, 0.0]]), weight, None, Routing(top_k=2))
    assert ids[0, 0] == 0
    assert weights[0, 0] == 1 and weights[0, 1] < 1e-30
    _, weights = cpu_gate.gate(torch.full((1, 4), -500.0), weight, None, Routing(top_k=2, scoring="sigmoid"))
    assert (weights < 1e-15).all()


def test_of_equal_choices_the_lower_expert_comes_first() -> None:
    ids, _ = cpu_gate.gate(torch.ones(1, 8), torch.ones(6, 8), None, Routing(top_k=3))
    assert ids.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("name", RULES)
def test_no_tokens(name: str) -> None:
    num_experts, rule = RULES[name]
    ids, weights = cpu_gate.gate(torch.zeros(0, 8), torch.zeros(num_experts, 8), None, rule)
    assert ids.shape == weights.shape == (0, rule.top_k)
