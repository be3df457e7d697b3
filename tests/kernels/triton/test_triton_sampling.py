"""The Triton sampler: the same tokens, numbers and edits as the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lockstep.kernels.reference import sampling as reference
from lockstep.kernels.reference.sampling import LogitEdits, Purpose, SamplingParams, SlotSampling, uniform
from lockstep.kernels.triton import draw as triton_draw, sampling as triton_sampling
from support.kernels.poison import DEVICE, poisoned

# temperature, top_k, top_p, min_p
ROWS = [
    (0.0, 0, 1.0, 0.0),
    (1e-9, 5, 0.5, 0.1),
    (1.0, 0, 1.0, 0.0),
    (0.7, 50, 1.0, 0.0),
    (1.0, 1, 1.0, 0.0),
    (1.3, 0, 0.95, 0.0),
    (1.0, 0, 1e-6, 0.0),
    (1.0, 0, 1.0, 0.1),
    (1.0, 0, 1.0, 1.0),
    (0.9, 20, 0.8, 0.02),
    (1.0, 10_000_000, 0.99, 0.0),
]
# One token, less than a chunk, more than one.
VOCABULARIES = [1, 300, 5003]


def params(rows: list[tuple[float, int, float, float]]) -> SamplingParams:
    temperature, top_k, top_p, min_p = zip(*rows, strict=True)
    return SamplingParams(
        np.array(temperature, np.float32),
        np.array(top_k, np.int64),
        np.array(top_p, np.float32),
        np.array(min_p, np.float32),
    )


def on_device(
    rows: list[tuple[float, int, float, float]], seeds: NDArray[np.int64], positions: NDArray[np.int64]
) -> SlotSampling:
    host = params(rows)
    arrays = (host.temperature_R, host.top_k_R, host.top_p_R, host.min_p_R, seeds, positions)
    return SlotSampling(*(torch.from_numpy(array).to(DEVICE) for array in arrays))


def random_logits(num_rows: int, vocab: int, spread: float = 3.0) -> torch.Tensor:
    return (torch.randn(num_rows, vocab, generator=torch.Generator().manual_seed(vocab)) * spread).to(DEVICE)


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_draws_the_tokens_of_the_reference(vocab: int) -> None:
    logits = random_logits(len(ROWS), vocab)
    before = logits.clone()
    for draw in range(3):
        numbers = uniform(np.arange(len(ROWS)) + 100 * draw, np.arange(len(ROWS)) * 7, Purpose.SAMPLE)
        with poisoned():
            tokens = triton_draw.sample(logits, params(ROWS), numbers)
        assert tokens.dtype == torch.int64
        assert tokens.tolist() == reference.sample(logits.cpu(), params(ROWS), numbers).tolist()
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    "row", [(1.0, 0, 1.0, 0.0), (0.8, 7, 1.0, 0.0), (1.0, 0, 0.9, 0.0), (1.2, 12, 0.7, 0.03)]
)
def test_draws_follow_the_distribution_of_the_reference(row: tuple[float, int, float, float]) -> None:
    num = 24
    logits = random_logits(1, 40, 1.5).expand(num, -1)
    uniform_R = (np.arange(num) + 0.5) / num
    counts = [
        np.bincount(column.sample(logits, params([row] * num), uniform_R).cpu().numpy(), minlength=40)
        for column in (triton_draw, reference)
    ]
    # a share may end next to one of the evenly spaced numbers
    assert np.abs(counts[0] - counts[1]).max() <= 1


def test_equal_values_at_the_boundary_are_all_let_in() -> None:
    logits = torch.tensor([0.0, 2.0, 1.0, 1.0, 1.0, -1.0], device=DEVICE).expand(20, -1)
    tokens = triton_draw.sample(logits, params([(1.0, 2, 1.0, 0.0)] * 20), (np.arange(20) + 0.5) / 20)
    assert sorted(set(tokens.tolist())) == [1, 2, 3, 4]


def test_extreme_uniform_numbers_stay_inside_the_distribution() -> None:
    logits = torch.full((3, 9000), -torch.inf, device=DEVICE)
    logits[:, 4700:4703] = torch.tensor([0.0, -3.0, -40.0], device=DEVICE)
    tokens = triton_draw.sample(logits, params([(1.0, 0, 1.0, 0.0)] * 3), np.array([0.0, 1 - 2.0**-53, 1.0]))
    assert tokens[0] == 4700
    assert tokens[1] in (4701, 4702) and tokens[2] == 4702


def test_greedy_takes_the_first_of_equals_in_any_chunk() -> None:
    logits = torch.zeros(3, 9001, device=DEVICE)
    logits[0, [8000, 4100, 5]] = 2.0
    logits[1, [8000, 4099]] = 2.0
    rows = params([(0.0, 0, 1.0, 0.0)] * 3)
    assert triton_draw.sample(logits, rows, np.zeros(3)).tolist() == [5, 4099, 0]


def test_a_row_draws_the_same_alone_and_in_any_batch() -> None:
    logits = random_logits(len(ROWS), 700)
    seeds, positions = np.arange(len(ROWS)), np.arange(len(ROWS)) * 3
    together = triton_draw.sample_slots(logits, on_device(ROWS, seeds, positions), Purpose.SAMPLE).tolist()
    for i in range(len(ROWS)):
        row = on_device(ROWS[i : i + 1], seeds[i : i + 1], positions[i : i + 1])
        assert (
            triton_draw.sample_slots(logits[i : i + 1], row, Purpose.SAMPLE).tolist() == together[i : i + 1]
        )


@pytest.mark.parametrize("purpose", list(Purpose))
def test_counters_on_the_device_give_the_numbers_of_the_host(purpose: Purpose) -> None:
    """With equal weights a token is the number itself, within 1 / V."""
    seeds = np.array([0, 1, -1, 42, 1 << 62, -(1 << 63), 7, 7])
    positions = np.array([0, 5, 1 << 20, 131071, 3, 9, 1, 2])
    vocab = 4096 * 2
    slots = on_device([(1.0, 0, 1.0, 0.0)] * 8, seeds, positions)
    tokens = triton_draw.sample_slots(torch.zeros(8, vocab, device=DEVICE), slots, purpose)
    assert tokens.tolist() == np.floor(uniform(seeds, positions, purpose) * vocab).astype(np.int64).tolist()


def test_edits_equal_the_reference() -> None:
    rng = np.random.default_rng(0)
    logits = random_logits(4, 600)
    pairs = [np.divmod(rng.choice(4 * 600, size, replace=False), 600) for size in (700, 40, 9)]
    edits = LogitEdits(
        counted_rows_N=pairs[0][0],
        counted_tokens_N=pairs[0][1],
        output_counts_N=rng.integers(0, 4, 700),
        repetition_R=np.array([1.0, 1.5, 0.8, 1.1], np.float32),
        presence_R=np.array([0.0, 0.4, -1.0, 0.2], np.float32),
        frequency_R=np.array([0.0, 0.25, 0.5, -0.5], np.float32),
        bias_rows_N=pairs[1][0],
        bias_tokens_N=pairs[1][1],
        bias_values_N=rng.normal(0, 5, 40).astype(np.float32),
        masked_rows_N=pairs[2][0],
        masked_tokens_N=pairs[2][1],
    )
    got, expected = logits.clone(), logits.clone()
    triton_sampling.edit_logits(got, edits)
    reference.edit_logits(expected, edits)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert (got == -torch.inf).sum() == 9


def test_pairs_of_row_minus_one_change_nothing() -> None:
    logits = random_logits(2, 10)
    rows = torch.tensor([-1, 1, -1], device=DEVICE)
    tokens = torch.tensor([3, 4, 5], device=DEVICE)
    for edit in (
        lambda x: triton_sampling.edit_bias(x, rows, tokens, torch.ones(3, device=DEVICE)),
        lambda x: triton_sampling.edit_mask(x, rows, tokens),
    ):
        changed = logits.clone()
        edit(changed)
        assert (changed != logits).nonzero().tolist() == [[1, 4]]


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
def test_penalties_by_counts_on_the_device_are_those_of_the_host(dtype: torch.dtype) -> None:
    """Rows of slots in any order; one without penalties, whose counts mean nothing."""
    rng, vocab = np.random.default_rng(0), 2500
    counts = rng.integers(0, 8, (4, vocab))
    penalties = np.array([[1.5, 0.4, 0.25], [1.0, 0.0, 0.0], [0.8, -1.0, 0.5], [1.1, 0.2, -0.5]], np.float32)
    slots, none = np.array([2, 1, 0]), np.zeros(0, np.int64)
    rows, tokens = np.nonzero(counts[slots] * (slots != 1)[:, None])
    edits = LogitEdits(
        counted_rows_N=rows,
        counted_tokens_N=tokens,
        output_counts_N=counts[slots][rows, tokens] >> 1,
        repetition_R=penalties[slots, 0],
        presence_R=penalties[slots, 1],
        frequency_R=penalties[slots, 2],
        bias_rows_N=none,
        bias_tokens_N=none,
        bias_values_N=np.zeros(0, np.float32),
        masked_rows_N=none,
        masked_tokens_N=none,
    )
    expected, got, plain = random_logits(3, vocab), random_logits(3, vocab), random_logits(3, vocab)
    reference.edit_logits(expected, edits)
    device = [torch.from_numpy(each).to(DEVICE) for each in (slots, counts, penalties)]
    device[1] = device[1].to(dtype)
    triton_sampling.penalise(got, *device)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(got[1], plain[1]) and not torch.equal(got, plain)
    reference.penalise(plain, *device)
    assert torch.equal(plain, expected), "to the bit"


@pytest.mark.parametrize("vocab", [1, 32, 50, 5003])
def test_tokens_outside_a_bitmask_are_refused(vocab: int) -> None:
    rng = np.random.default_rng(1)
    rows = np.array([3, 0])
    bits = rng.integers(-(2**31), 2**31, (2, -(-vocab // 32)), np.int64).astype(np.int32)
    got, expected = random_logits(4, vocab), random_logits(4, vocab)
    triton_sampling.allow_only(got, rows, bits)
    reference.allow_only(expected, rows, bits)
    assert torch.equal(got, expected)
    changed = random_logits(4, vocab)
    padding = torch.full((2,), -1, device=DEVICE)
    triton_sampling.edit_allowed(changed, padding, torch.from_numpy(bits).to(DEVICE))
    assert torch.equal(changed, random_logits(4, vocab))


@pytest.mark.parametrize("vocab", [50, 5003])
def test_logprobs_equal_the_reference(vocab: int) -> None:
    logits = random_logits(3, vocab)
    logits[0, :20] = -torch.inf
    tokens = torch.tensor([21, 0, vocab - 1], device=DEVICE)
    with poisoned():
        got = triton_sampling.logprobs(logits, tokens, 5)
    expected = reference.logprobs(logits, tokens, 5)
    assert torch.equal(got[1], expected[1])
    torch.testing.assert_close(got[0], expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(got[2], expected[2], rtol=0, atol=1e-5)


def test_no_rows() -> None:
    nothing = params([(1.0, 0, 1.0, 0.0)])
    nothing = SamplingParams(
        *(getattr(nothing, name)[:0] for name in ("temperature_R", "top_k_R", "top_p_R", "min_p_R"))
    )
    assert triton_draw.sample(torch.empty(0, 10, device=DEVICE), nothing, np.empty(0)).shape == (0,)
    chosen, ids, values = triton_sampling.logprobs(
        torch.empty(0, 10, device=DEVICE), torch.empty(0, dtype=torch.int64, device=DEVICE), 2
    )
    assert chosen.shape == (0,) and ids.shape == values.shape == (0, 2)
