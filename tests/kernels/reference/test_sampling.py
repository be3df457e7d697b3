"""Sampling: its distribution, independence of the batch, edits of logits, log-probabilities."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from numpy.typing import NDArray

from lockstep.kernels.reference.sampling import (
    LogitEdits,
    Purpose,
    SamplingParams,
    allow_only,
    edit_logits,
    logprobs,
    sample,
    token_counts,
    uniform,
)

NONE = np.array([], np.int64)


def params(rows: list[tuple[float, int, float, float]]) -> SamplingParams:
    """Rows of (temperature, top_k, top_p, min_p)."""
    temperature, top_k, top_p, min_p = zip(*rows, strict=True)
    return SamplingParams(
        np.array(temperature, np.float32),
        np.array(top_k, np.int64),
        np.array(top_p, np.float32),
        np.array(min_p, np.float32),
    )


def edits(num_rows: int, **changes: NDArray[np.generic]) -> LogitEdits:
    empty = {
        f"{kind}_{what}_N": NONE for kind in ("counted", "bias", "masked") for what in ("rows", "tokens")
    }
    plain = {"repetition_R": np.ones(num_rows, np.float32)}
    plain |= {f"{name}_R": np.zeros(num_rows, np.float32) for name in ("presence", "frequency")}
    return LogitEdits(
        **(empty | plain | {"output_counts_N": NONE, "bias_values_N": np.array([], np.float32)} | changes)
    )  # type: ignore[arg-type]


def reference(
    logits: NDArray[np.float32], temperature: float, top_k: int, top_p: float, min_p: float
) -> NDArray[np.float64]:
    """The distribution by definition, in float64; tokens are kept best first."""
    weights = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    weights[weights < min_p * weights.max()] = 0
    order = np.argsort(-weights, kind="stable")
    if top_k:
        weights[order[top_k:]] = 0
    reached = np.cumsum((weights / weights.sum())[order])
    weights[order[1 + int((reached < top_p).sum()) :]] = 0
    return weights / weights.sum()


def drawn_distribution(
    logits: NDArray[np.float32], row: tuple[float, int, float, float], num: int = 4000
) -> NDArray[np.float64]:
    """Shares of the tokens drawn by evenly spaced uniform numbers: the distribution within 1 /
    num.
    """
    uniform_R = (np.arange(num) + 0.5) / num
    tokens = sample(torch.from_numpy(logits).expand(num, -1), params([row] * num), uniform_R)
    return np.bincount(tokens.numpy(), minlength=len(logits)) / num


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    vocab=st.sampled_from([3, 40, 700]),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 2, 7, 10_000]),
    top_p=st.sampled_from([1.0, 0.9, 0.5, 1e-6]),
    min_p=st.sampled_from([0.0, 0.05, 1.0]),
)
def test_draws_follow_the_definition(
    seed: int, vocab: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = np.random.default_rng(seed).normal(0, 2, vocab).astype(np.float32)
    expected = reference(logits, temperature, top_k, top_p, min_p)
    drawn = drawn_distribution(logits, (temperature, top_k, top_p, min_p))
    np.testing.assert_allclose(drawn, expected, atol=1.01 / 4000)
    assert not drawn[expected == 0].any()


@pytest.mark.parametrize("top_p", [0.3, 0.97])
def test_nucleus_wider_than_the_first_search(top_p: float) -> None:
    logits = np.random.default_rng(0).normal(0, 0.1, 5000).astype(np.float32)
    drawn = drawn_distribution(logits, (1.0, 0, top_p, 0.0), num=2000)
    expected = reference(logits, 1.0, 0, top_p, 0.0)
    assert (expected > 0).sum() > 256
    assert not drawn[expected == 0].any()
    np.testing.assert_allclose(drawn.cumsum(), expected.cumsum(), atol=1.01 / 2000)


def test_equal_values_at_the_boundary_are_all_let_in() -> None:
    logits = np.array([0.0, 2.0, 1.0, 1.0, 1.0, -1.0], np.float32)
    assert (drawn_distribution(logits, (1.0, 2, 1.0, 0.0)) > 0).tolist() == [
        False,
        True,
        True,
        True,
        True,
        False,
    ]


def test_extreme_uniform_numbers_stay_inside_the_distribution() -> None:
    logits = torch.full((2, 1500), -torch.inf)
    logits[:, 700:703] = torch.tensor([0.0, -3.0, -40.0])
    tokens = sample(logits, params([(1.0, 0, 1.0, 0.0)] * 2), np.array([0.0, 1 - 2.0**-53]))
    assert tokens[0] == 700
    assert tokens[1] in (701, 702)


def test_rounding_of_the_total_leads_to_no_excluded_token() -> None:
    logits = torch.full((200, 1500), -torch.inf)
    logits[:, 600:700] = torch.randn(200, 100, generator=torch.Generator().manual_seed(0))
    tokens = sample(logits, params([(1.0, 0, 1.0, 0.0)] * 200), np.full(200, 1 - 2.0**-53))
    assert ((tokens >= 600) & (tokens < 700)).all()


def test_temperature_zero_and_nearly_zero_are_greedy() -> None:
    logits = torch.randn(3, 100) * 50
    rows = params([(0.0, 0, 1.0, 0.0), (1e-9, 5, 0.5, 0.1), (1e-4, 0, 1.0, 0.0)])
    assert sample(logits, rows, np.array([0.9, 0.9, 0.9])).tolist() == logits.argmax(-1).tolist()


def test_a_row_draws_the_same_alone_and_in_any_batch() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(24, 3000, generator=generator) * 2
    before = logits.clone()
    choices = [
        (0.0, 0, 1.0, 0.0),
        (1.0, 0, 1.0, 0.0),
        (0.7, 50, 1.0, 0.0),
        (1.3, 0, 0.95, 0.0),
        (1.0, 0, 1.0, 0.1),
        (0.9, 20, 0.8, 0.02),
    ]
    rows = [choices[i % len(choices)] for i in range(24)]
    numbers = uniform(np.arange(24), np.arange(24) * 7, Purpose.SAMPLE)
    together = sample(logits, params(rows), numbers).tolist()
    alone = [int(sample(logits[i : i + 1], params(rows[i : i + 1]), numbers[i : i + 1])) for i in range(24)]
    assert together == alone
    order = np.random.default_rng(0).permutation(24)
    shuffled = sample(logits[order], params([rows[i] for i in order]), numbers[order]).tolist()
    assert shuffled == [together[i] for i in order]
    assert torch.equal(logits, before)


def test_uniform_is_a_function_of_seed_position_and_purpose() -> None:
    seeds = np.repeat(np.arange(-100, 100), 100)
    positions = np.tile(np.arange(100), 200)
    numbers = uniform(seeds, positions, Purpose.SAMPLE)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert len(np.unique(numbers)) == len(numbers)
    assert abs(numbers.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.03
    assert uniform(seeds[42:43], positions[42:43], Purpose.SAMPLE)[0] == numbers[42]
    for purpose in (Purpose.DRAFT, Purpose.ACCEPT):
        assert abs(np.corrcoef(numbers, uniform(seeds, positions, purpose))[0, 1]) < 0.03


def test_uniform_keeps_its_values() -> None:
    """A replay by a later version must draw the same tokens."""
    numbers = uniform(np.array([0, 1, -1]), np.array([0, 5, 1 << 20]), Purpose.SAMPLE)
    assert numbers.tolist() == [0.13870941014555427, 0.1883616826608545, 0.5842663137512842]


def test_penalties_follow_the_definition() -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 2, (2, 12)).astype(np.float32)
    histories, prompt_lengths = [[3, 3, 5, 7, 3, 9, 9], [0, 1, 0]], [3, 3]
    repetition, presence, frequency = [1.5, 0.8], [0.4, 5.0], [0.25, -1.0]
    expected = logits.copy()
    for row, history in enumerate(histories):
        output = history[prompt_lengths[row] :]
        for token in set(history):
            value = expected[row, token]
            value = value / repetition[row] if value > 0 else value * repetition[row]
            expected[row, token] = (
                value - frequency[row] * output.count(token) - presence[row] * (token in output)
            )
    counted = [token_counts(np.array(h, np.int32), n) for h, n in zip(histories, prompt_lengths, strict=True)]
    got = torch.from_numpy(logits.copy())
    edit_logits(
        got,
        edits(
            2,
            counted_rows_N=np.repeat([0, 1], [len(tokens) for tokens, _ in counted]),
            counted_tokens_N=np.concatenate([tokens for tokens, _ in counted]),
            output_counts_N=np.concatenate([counts for _, counts in counted]),
            repetition_R=np.array(repetition, np.float32),
            presence_R=np.array(presence, np.float32),
            frequency_R=np.array(frequency, np.float32),
        ),
    )
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5)


def test_bias_and_mask_touch_their_pairs_alone() -> None:
    logits = torch.zeros(2, 6)
    edit_logits(
        logits,
        edits(
            2,
            bias_rows_N=np.array([0, 1]),
            bias_tokens_N=np.array([2, 3]),
            bias_values_N=np.array([4.0, -2.0], np.float32),
            masked_rows_N=np.array([1, 1]),
            masked_tokens_N=np.array([0, 3]),
        ),
    )
    inf = float("inf")
    assert logits.tolist() == [[0, 0, 4, 0, 0, 0], [-inf, 0, 0, -inf, 0, 0]]


@pytest.mark.parametrize("vocab", [5, 32, 33, 100])
def test_only_what_a_mask_allows_is_sampled(vocab: int) -> None:
    draw = np.random.default_rng(vocab)
    logits_RV = torch.from_numpy(draw.normal(size=(6, vocab)).astype(np.float32))
    before_RV, rows = logits_RV.clone(), np.array([4, 1], np.int64)
    allowed = draw.random((2, vocab)) < 0.3
    allowed[:, vocab - 1] = True
    padded = np.pad(allowed, ((0, 0), (0, -vocab % 32)))
    allow_only(logits_RV, rows, np.packbits(padded, axis=1, bitorder="little").view(np.int32))
    for index, row in enumerate(rows):
        kept = torch.from_numpy(allowed[index])
        assert torch.equal(logits_RV[row][kept], before_RV[row][kept])
        assert (logits_RV[row][~kept] == -torch.inf).all()
    others = [row for row in range(6) if row not in rows]
    assert torch.equal(logits_RV[others], before_RV[others]), "rows without a mask are untouched"
    for seed in range(20):
        tokens = sample(logits_RV, params([(2.0, 0, 1.0, 0.0)] * 6), draw.random(6))
        assert all(allowed[index, int(tokens[row])] for index, row in enumerate(rows)), seed


def test_logprobs_are_those_of_the_model() -> None:
    logits = torch.randn(3, 50)
    tokens = torch.tensor([4, 0, 49])
    chosen, ids, values = logprobs(logits, tokens, 5)
    expected = logits.double().log_softmax(-1)
    torch.testing.assert_close(chosen.double(), expected[torch.arange(3), tokens], rtol=0, atol=1e-5)
    assert ids.tolist() == expected.topk(5).indices.tolist()
    torch.testing.assert_close(values.double(), expected.topk(5).values, rtol=0, atol=1e-5)
    assert logprobs(logits, tokens, 0)[1].shape == (3, 0)


def test_no_rows() -> None:
    nothing = params([(1.0, 0, 1.0, 0.0)])
    nothing = SamplingParams(
        *(getattr(nothing, name)[:0] for name in ("temperature_R", "top_k_R", "top_p_R", "min_p_R"))
    )
    assert sample(torch.empty(0, 10), nothing, np.empty(0)).shape == (0,)
