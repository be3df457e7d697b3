"""The gate against a naive implementation of the papers, token by token."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lockstep.kernels.reference.gate import Routing, expert_counts, gate

RULES = {
    "softmax": Routing(top_k=4),
    "softmax, plain weights": Routing(top_k=4, normalise=False),
    "sigmoid": Routing(top_k=3, scoring="sigmoid", scale=2.5),
    "sigmoid, plain weights": Routing(top_k=3, scoring="sigmoid", normalise=False, scale=1.5),
    "groups": Routing(top_k=4, scoring="sigmoid", num_groups=4, top_groups=2, scale=2.5),
    "groups of one": Routing(top_k=2, scoring="sigmoid", num_groups=16, top_groups=3),
    "all groups": Routing(top_k=4, scoring="sigmoid", num_groups=4, top_groups=4),
    "softmax groups": Routing(top_k=2, num_groups=2, top_groups=1),
    "bias of the logits": Routing(top_k=3, logit_bias=True),
    "bias of sigmoid's logits": Routing(top_k=3, scoring="sigmoid", normalise=False, logit_bias=True),
    "groups by their best": Routing(
        top_k=3, normalise=False, scale=16.0, num_groups=4, top_groups=2, group_quality="best"
    ),
}


def _inputs(dtype: torch.dtype = torch.float32, tokens: int = 33) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, 24, generator=generator).to(dtype)
    return x, torch.randn(16, 24, generator=generator) * 0.4, torch.randn(16, generator=generator) * 0.3


def _naive(x: list[float], weight: list[list[float]], bias: list[float], rule: Routing) -> dict[int, float]:
    """Expert -> weight for one token."""
    logits = [sum(a * b for a, b in zip(x, row, strict=True)) for row in weight]
    if rule.logit_bias:
        logits, bias = [logit + b for logit, b in zip(logits, bias, strict=True)], [0.0] * len(bias)
    if rule.scoring == "softmax":
        total = sum(math.exp(logit) for logit in logits)
        scores = [math.exp(logit) / total for logit in logits]
    else:
        scores = [1 / (1 + math.exp(-logit)) for logit in logits]
    choice = [score + b for score, b in zip(scores, bias, strict=True)]
    size = len(choice) // rule.num_groups
    counted = 1 if rule.group_quality == "best" else 2
    groups = [sum(sorted(choice[g * size : (g + 1) * size])[-counted:]) for g in range(rule.num_groups)]
    best = sorted(range(rule.num_groups), key=lambda g: -groups[g])[: rule.top_groups]
    eligible = [expert for expert in range(len(choice)) if expert // size in best]
    chosen = sorted(eligible, key=lambda expert: -choice[expert])[: rule.top_k]
    total = sum(scores[expert] for expert in chosen) if rule.normalise else 1.0
    return {expert: scores[expert] / total * rule.scale for expert in chosen}


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_equals_the_naive_gate(name: str, with_bias: bool) -> None:
    x, weight, bias = _inputs()
    bias = bias if with_bias else torch.zeros_like(bias)
    ids, weights = gate(x, weight, bias if with_bias else None, RULES[name])
    assert (
        ids.dtype == torch.int64
        and weights.dtype == torch.float32
        and ids.shape == weights.shape == (33, RULES[name].top_k)
    )
    for token in range(33):
        expected = _naive(x[token].tolist(), weight.tolist(), bias.tolist(), RULES[name])
        assert ids[token].tolist() == list(expected), f"token {token}"
        assert weights[token].tolist() == pytest.approx(list(expected.values()), rel=1e-5)


def test_bias_turns_the_choice_but_not_the_weights() -> None:
    x, weight, _ = _inputs()
    rule = Routing(top_k=1, scoring="sigmoid", normalise=False)
    bias = torch.zeros(16)
    bias[5] = 10.0
    ids, weights = gate(x, weight, bias, rule)
    assert (ids == 5).all()
    torch.testing.assert_close(weights[:, 0], (x @ weight[5]).sigmoid())


def test_scores_are_float32_whatever_comes_in() -> None:
    x, weight, _ = _inputs(torch.bfloat16)
    ids, weights = gate(x, weight, None, RULES["softmax"])
    same_ids, same_weights = gate(x.float(), weight, None, RULES["softmax"])
    assert torch.equal(ids, same_ids) and torch.equal(weights, same_weights)


def test_no_tokens() -> None:
    for rule in RULES.values():
        ids, weights = gate(torch.zeros(0, 24), torch.zeros(16, 24), torch.zeros(16), rule)
        assert ids.shape == weights.shape == (0, rule.top_k)
    assert expert_counts(torch.zeros(0, 2, dtype=torch.int64), 3).tolist() == [0, 0, 0]


def test_counts_leave_padding_out() -> None:
    assert expert_counts(torch.tensor([[0, 2], [2, -1], [-1, -1]]), 4).tolist() == [1, 0, 2, 0]
