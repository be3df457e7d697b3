"""The compiled sampler: greedy rows as the reference, ties included, and rows that are drawn through the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lockstep.kernels import cpu_sampling, sampling
from lockstep.kernels.sampling import Purpose, SamplingParams, uniform


def _params(temperature: list[float]) -> SamplingParams:
    nothing = np.zeros(len(temperature), np.float32)
    return SamplingParams(np.array(temperature, np.float32), nothing.astype(np.int64), nothing + 1, nothing)


@pytest.mark.parametrize("vocab", [1, 511, 512, 513, 5003])
def test_greedy_rows_take_the_largest(vocab: int) -> None:
    logits = torch.randn(9, vocab, generator=torch.Generator().manual_seed(vocab))
    tokens = cpu_sampling.sample(logits, _params([0.0] * 9), np.zeros(9))
    assert tokens.dtype == torch.int64 and torch.equal(tokens, logits.argmax(-1))


def test_of_equal_logits_the_lower_token_is_taken() -> None:
    logits = torch.randn(4, 3000).clamp(max=1.0)
    for row, places in enumerate(([2999], [700, 701, 2900], [0, 511, 512], [511, 512])):
        logits[row, places] = 2.0
    assert cpu_sampling.sample(logits, _params([0.0] * 4), np.zeros(4)).tolist() == [2999, 700, 0, 511]


def test_excluded_tokens_are_passed_over() -> None:
    logits = torch.full((3, 1200), -torch.inf)
    logits[0, 1100] = -1e30
    logits[1, :2] = torch.tensor([-torch.inf, -3.0])
    tokens = cpu_sampling.sample(logits, _params([0.0] * 3), np.zeros(3)).tolist()
    assert tokens == [1100, 1, 0]


def test_rows_that_are_drawn_are_those_of_the_reference() -> None:
    logits = torch.randn(6, 900, generator=torch.Generator().manual_seed(0)) * 2
    params, numbers = _params([0.0, 1.0, 0.7, 0.0, 1.3, 1e-9]), uniform(np.arange(6), np.arange(6), Purpose.SAMPLE)
    tokens = cpu_sampling.sample(logits, params, numbers)
    assert torch.equal(tokens, sampling.sample(logits, params, numbers))
    assert torch.equal(tokens[[0, 3, 5]], logits[[0, 3, 5]].argmax(-1))
