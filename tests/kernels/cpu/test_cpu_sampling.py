"""The compiled sampler: greedy rows match the reference, ties included; drawn rows go through the
reference.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lockstep.kernels.cpu import sampling as cpu_sampling
from lockstep.kernels.reference import sampling
from lockstep.kernels.reference.sampling import Purpose, SamplingParams, uniform


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
    params, numbers = (
        _params([0.0, 1.0, 0.7, 0.0, 1.3, 1e-9]),
        uniform(np.arange(6), np.arange(6), Purpose.SAMPLE),
    )
    tokens = cpu_sampling.sample(logits, params, numbers)
    assert torch.equal(tokens, sampling.sample(logits, params, numbers))
    assert torch.equal(tokens[[0, 3, 5]], logits[[0, 3, 5]].argmax(-1))


@pytest.mark.parametrize("count", [1, 20, 64])
@pytest.mark.parametrize("vocab", [64 * 4 * 128, 40_001])
def test_the_likeliest_are_those_of_the_reference(vocab: int, count: int) -> None:
    x = torch.randn(7, vocab, generator=torch.Generator().manual_seed(0))
    x[1] = x[1].sort().values  # all of the top values lie in the last blocks
    x[2, 300:] = -torch.inf
    x[3, 10:] = -torch.inf  # fewer than are asked for
    (values, ids), expected = cpu_sampling.likeliest(x, count), sampling.likeliest(x, count)
    assert torch.equal(values, expected[0]) and torch.equal(x.gather(1, ids), values)
    assert torch.equal(ids[:3], expected[1][:3]) and all(len(set(row)) == count for row in ids.tolist())
    wider = torch.full((7, vocab + 5), 9.0)
    wider[:, :vocab] = x
    assert torch.equal(cpu_sampling.likeliest(wider[:, :vocab], count)[1], ids)


def test_of_equal_values_the_lower_tokens_are_the_likeliest() -> None:
    x = torch.zeros(2, 40_000)
    x[0, [39_999, 7_000, 200]], x[1, 5:] = 1.0, 2.0
    values, ids = cpu_sampling.likeliest(x, 5)
    assert ids.tolist() == [[200, 7_000, 39_999, 0, 1], [5, 6, 7, 8, 9]] and values.tolist() == [
        [1, 1, 1, 0, 0],
        [2] * 5,
    ]


def test_nan_logits_do_no_harm() -> None:
    x = torch.randn(3, 40_000)
    x[0, 777], x[1, ::2], x[2] = torch.nan, torch.nan, torch.nan
    values, ids = cpu_sampling.likeliest(x, 50)
    assert values.shape == ids.shape == (3, 50) and ((ids >= 0) & (ids < 40_000)).all()


@pytest.mark.parametrize(
    "settings", [(50, 0.9, 0.0), (1, 1.0, 0.0), (0, 0.3, 0.0), (300, 0.999, 0.01), (0, 0.95, 0.0)]
)
def test_draws_over_a_large_vocabulary_are_those_of_the_reference(settings: tuple[int, float, float]) -> None:
    """Top-k and top-p with one setting each, for rows with and without them: the same tokens."""
    logits = torch.randn(24, 152_064, generator=torch.Generator().manual_seed(1)) * 3
    top_k, top_p, min_p = (np.full(24, setting) for setting in settings)
    top_k[::5], top_p[::7] = 0, 1.0
    params = SamplingParams(
        np.full(24, 0.8, np.float32), top_k, top_p.astype(np.float32), min_p.astype(np.float32)
    )
    numbers = uniform(np.arange(24), np.arange(24) * 3, Purpose.SAMPLE)
    assert torch.equal(cpu_sampling.sample(logits, params, numbers), sampling.sample(logits, params, numbers))


def test_logprobs_are_those_of_the_reference() -> None:
    logits, tokens = torch.randn(5, 30_000) * 3, torch.arange(5)
    for got, expected in zip(
        cpu_sampling.logprobs(logits, tokens, 20), sampling.logprobs(logits, tokens, 20), strict=True
    ):
        assert got.dtype == expected.dtype and torch.equal(got, expected)
