"""A device whose ranks have parts of the vocabulary draws the tokens that one rank draws by all
logits, reads nothing on the host, and sends few numbers.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lockstep.engine.rank.device.split_draw import MOST_KEPT, draw_in_parts
from lockstep.kernels.reference.sampling import Purpose, SlotSampling, sample_slots, uniform, uniform_slots
from lockstep.parallel.logits import SplitLogits
from lockstep.parallel.tensor import UNSPLIT
from support.engine.rank import split_rows
from support.engine.rank.launch_recorder import LaunchRecorder
from support.parallel.gloo_ranks import run_ranks

FEW = [
    row
    for row, each in enumerate(split_rows.ROWS)
    if each.repetition_penalty == 1 and each.top_k <= MOST_KEPT and (each.top_k > 0 or each.top_p == 1)
]


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("kind", ["even", "ties", "far apart", "forbidden"])
def test_tokens_and_log_probabilities_are_those_of_one_rank(kind: str, size: int) -> None:
    for found, expected, _ in run_ranks(split_rows.draw_in_parts, size, kind, range(len(split_rows.ROWS))):
        assert found == expected


def test_whole_logits_stay_where_they_are_however_many_tie() -> None:
    for kind in ("even", "ties"):
        for found, expected, most in run_ranks(split_rows.draw_in_parts, 2, kind, FEW):
            assert found == expected and most <= MOST_KEPT


def test_a_recording_draws_by_the_settings_that_it_finds() -> None:
    """Nothing is read while it is recorded, so every row may change its way to draw."""
    num_rows, dice = 12, np.random.default_rng(3)
    logits_RV = 3 * torch.randn(num_rows, 700, generator=torch.Generator().manual_seed(1))
    kinds = (np.float32, np.int64, np.float32, np.float32, np.int64, np.int64)
    there = SlotSampling(
        *(torch.zeros(num_rows, dtype=torch.from_numpy(np.zeros(1, k)).dtype) for k in kinds)
    )
    logits = SplitLogits(logits_RV, 0, 700, UNSPLIT)
    repeat, tokens_R = LaunchRecorder().record(lambda: draw_in_parts(logits, there, MOST_KEPT))
    for _ in range(5):
        top_k = dice.choice([0, 1, 7, 200], num_rows)
        settings = SlotSampling(
            *map(
                torch.from_numpy,
                (
                    dice.choice([0, 0.5, 1.5], num_rows).astype(np.float32),
                    top_k,
                    np.where(top_k > 0, dice.choice([0.5, 0.9, 1], num_rows), 1).astype(np.float32),
                    dice.choice([0, 0.1], num_rows).astype(np.float32),
                    dice.integers(-(2**63), 2**63, num_rows),
                    dice.integers(0, 9999, num_rows),
                ),
            )
        )
        for name, values in vars(settings).items():
            getattr(there, name).copy_(values)
        logits_RV.copy_(logits_RV.roll(1, 0))
        repeat()
        assert tokens_R.tolist() == sample_slots(logits_RV, settings, Purpose.SAMPLE).tolist()


def test_numbers_on_a_device_are_those_of_the_host() -> None:
    dice = np.random.default_rng(5)
    seeds, positions = dice.integers(-(2**63), 2**63, 500), dice.integers(0, 2**40, 500)
    found = uniform_slots(torch.from_numpy(seeds), torch.from_numpy(positions), Purpose.DRAFT)
    assert found.tolist() == uniform(seeds, positions, Purpose.DRAFT).tolist()


def test_rows_without_a_number_draw_some_token() -> None:
    """Rows of padding may hold anything."""
    logits_RV = torch.full((3, 700), torch.nan)
    logits_RV[1] = -torch.inf
    logits_RV[2, ::2] = 1.0
    ones, zeros = torch.ones(3), torch.zeros(3, dtype=torch.int64)
    for temperature in (0.0, 1.0):
        settings = SlotSampling(ones * temperature, zeros, ones, ones * 0, zeros, zeros + 7)
        tokens_R = draw_in_parts(SplitLogits(logits_RV, 0, 700, UNSPLIT), settings, MOST_KEPT)
        assert ((tokens_R >= 0) & (tokens_R < 700)).all()
