"""The fit of the cost model, above all from sections that are alike and tell little."""

from __future__ import annotations

from dataclasses import astuple
from random import Random

import numpy as np
import pytest

from lockstep.engine.planner.cost_model import Cost, CostModel

GPU = Cost(fixed=0.012, token=4e-5, kv=3e-7, context=2.5e-9)
"""Coefficients of a GPU, whose terms of a step differ much from the default's."""


def told(
    model: CostModel, sections: list[tuple[float, float, float]], truth: Cost = GPU, noise: float = 0.0
) -> CostModel:
    dice = Random(1)
    for tokens, kv, context in sections:
        seconds = truth.fixed + truth.token * tokens + truth.kv * kv + truth.context * context
        model.observe(tokens, kv, context, seconds * (1 + noise * dice.uniform(-1, 1)))
    return model


def mixed(count: int) -> list[tuple[float, float, float]]:
    dice = Random(2)
    return [
        (dice.randint(1, 1000), dice.randint(0, 60_000), dice.choice((0, dice.randint(0, 1_500_000))))
        for _ in range(count)
    ]


def errors(model: CostModel, sections: list[tuple[float, float, float]]) -> list[float]:
    exact = CostModel()
    exact.cost = GPU
    found = []
    for tokens, kv, context in sections:
        right = exact.seconds(tokens, kv, context)
        found.append(abs(model.seconds(tokens, kv, context) / right - 1))
    return found


def test_sections_of_all_kinds_tell_the_coefficients() -> None:
    model = told(CostModel(), mixed(320))
    assert astuple(model.cost) == pytest.approx(astuple(GPU), rel=0.02)
    noisy = told(CostModel(), mixed(320), noise=0.2)
    assert np.median(errors(noisy, mixed(100))) < 0.1


@pytest.mark.parametrize("sections", [
    [(1024.0, 1.0, 524_288.0)] * 16,  # full chunks of a prompt
    [(1024.0, float(kv), 524_288.0 + 1000 * kv) for kv in range(16)],
    [(3.0, 9_000.0, 0.0)] * 64,  # the same few rows decode
    [(128.0, 128_000.0 + 128 * step, 0.0) for step in range(640)],  # the same many, for a while
])  # fmt: skip
@pytest.mark.parametrize("before", [0, 320])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_sections_that_are_alike_make_no_coefficient_vanish(
    sections: list[tuple[float, float, float]], before: int, noise: float
) -> None:
    """If a token cost nothing, every rank would seem equally quick, and admission would send a
    whole burst to the first.
    """
    model = told(told(CostModel(), mixed(before)), sections, noise=noise)
    known = (GPU if before else Cost()).token
    assert model.cost.token > 0.02 * known
    assert max(errors(model, sections[-16:])) < 0.1, "these sections themselves are not predicted"
    if before and not noise:
        assert model.cost.token == pytest.approx(GPU.token, rel=0.1), "an earlier coefficient is lost"


def test_the_speed_is_learned_from_the_first_sections_and_the_proportions_kept() -> None:
    slow = Cost(*(30 * each for each in astuple(Cost())))
    model = told(CostModel(), [(1024.0, 1.0, 524_288.0)] * 16, slow)
    assert astuple(model.cost) == pytest.approx(astuple(slow), rel=1e-6)


def test_a_coefficient_that_was_fitted_to_zero_comes_back() -> None:
    free = Cost(fixed=0.012, token=0.0, kv=3e-7, context=2.5e-9)
    model = told(CostModel(), mixed(640), free)
    assert model.cost.token < 1e-6
    told(model, mixed(640))
    assert model.cost.token == pytest.approx(GPU.token, rel=0.1)


def test_a_burst_of_full_chunks_makes_no_token_free() -> None:
    """The slowest sections of a burst's first steps differ by noise, not by their tokens."""
    milliseconds = (49, 53, 54, 49, 53, 53, 54, 56, 54, 55, 52, 50, 51, 52, 54, 54)
    model = CostModel()
    for step, taken in enumerate(each / 1000 for each in milliseconds):
        model.observe(
            1024 if step < 2 else 960 - step // 8, 3004 * (step // 8), 1_048_576 * (step == 1), taken
        )
    assert model.cost.token > 0.5 * 0.05 / 1000


def test_an_early_model_is_fitted_from_the_first_section_on() -> None:
    slow = Cost(*(300 * each for each in astuple(Cost())))
    late, early = CostModel(), CostModel(early=True)
    for model in (late, early):
        told(model, [(256.0, 0.0, 0.0)], slow)
    assert late.cost == Cost()
    assert early.seconds(256.0) == pytest.approx(slow.fixed + 256 * slow.token, rel=1e-6)
    rest = mixed(319)
    told(early, rest)
    assert max(errors(early, rest[-50:])) < 0.2


def test_sections_grow_by_what_was_measured_and_shrink_after_a_hang() -> None:
    model = CostModel(early=True)
    assert model.trusted == 256
    told(model, [(256.0, 0.0, 0.0)])
    assert model.trusted == 1024
    told(model, [(3.0, 100.0, 0.0)])
    assert model.trusted == 1024, "a small section tells nothing of large ones"
    model.distrust(1000)
    assert model.trusted == 500
    for _ in range(20):
        model.distrust(model.trusted)
    assert model.trusted == 16
    told(model, [(16.0, 0.0, 0.0)])
    assert model.trusted == 64
    plain = CostModel()
    plain.distrust(1000)
    assert plain.trusted is None
