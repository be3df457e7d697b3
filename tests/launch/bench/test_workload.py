"""Prompts and arrivals of a benchmark, and the limit of a load."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from lockstep.launch.bench.limit import limit_of
from lockstep.launch.bench.workload import OfferedLoad, Workload, default_requests
from lockstep.launch.capacity.plan import CapacityPlan, plan_recipe
from lockstep.launch.recipe.file import load_recipe


def workload(*loads: OfferedLoad, input: int = 64, output: int = 16, shared: int = 0) -> Workload:
    return Workload(loads, input, output, shared, rounds=3, seed=0)


def test_prompts_share_their_start_and_nothing_else() -> None:
    made = workload(input=64, shared=48).prompts(50, 1000, np.random.default_rng(1))
    assert {len(prompt) for prompt in made} == {64}
    assert len({tuple(prompt[:48]) for prompt in made}) == 1
    assert len({tuple(prompt[48:]) for prompt in made}) == 50
    assert max(map(max, made)) < 1000


def test_unique_prompts_differ_from_their_first_block_on() -> None:
    made = workload(input=32).prompts(50, 1000, np.random.default_rng(1))
    assert len({tuple(prompt[:16]) for prompt in made}) == 50


def test_arrivals_are_a_poisson_process_of_the_rate() -> None:
    load = OfferedLoad(20_000, rate=4.0)
    moments = load.arrivals(np.random.default_rng(3))
    assert moments == load.arrivals(np.random.default_rng(3))
    assert moments[0] == 0.0
    gaps = np.array([b - a for a, b in pairwise(moments)])
    assert gaps.mean() == pytest.approx(1 / 4, rel=0.03)
    assert gaps.std() == pytest.approx(1 / 4, rel=0.03), "an exponential's deviation is its mean"


def test_a_concurrency_is_due_at_once() -> None:
    assert OfferedLoad(3, concurrency=2).arrivals(np.random.default_rng(0)) == [0.0, 0.0, 0.0]


def test_default_numbers_of_requests() -> None:
    assert [default_requests(level, None) for level in (1, 8, 32)] == [8, 32, 128]
    assert [default_requests(None, rate) for rate in (0.1, 2.0, 10_000.0)] == [8, 60, 10_000]


@pytest.fixture(scope="module")
def plan() -> CapacityPlan:
    recipe, path = load_recipe("demo", ())
    return plan_recipe(recipe, path.parent, 80)


def test_the_limit_is_the_plans_floor_of_the_same_batch(plan: CapacityPlan) -> None:
    """64 in and 32 out: a running request has 80 tokens on average, as in the plan."""
    found = limit_of(plan, workload(input=64, output=32), plan.largest_batch)
    assert found.tpot == pytest.approx(plan.seconds_per_token)
    assert found.output_per_second == pytest.approx(plan.largest_batch / plan.seconds_per_token)
    assert found.binds == plan.decode.floor.binds


def test_no_more_run_than_there_are_slots(plan: CapacityPlan) -> None:
    full = limit_of(plan, workload(input=64, output=32), plan.largest_batch)
    assert limit_of(plan, workload(input=64, output=32), 10 * plan.largest_batch) == full


def test_limits_follow_the_load(plan: CapacityPlan) -> None:
    one, eight = (limit_of(plan, workload(), in_flight) for in_flight in (1, 8))
    assert one.tpot < eight.tpot
    assert one.output_per_second < eight.output_per_second
    longer = limit_of(plan, workload(input=640), 1)
    cached = limit_of(plan, workload(input=640, shared=576), 1)
    whole = limit_of(plan, workload(input=640, shared=640), 1)
    assert one.ttft < cached.ttft < longer.ttft
    assert 0 < whole.ttft < cached.ttft


def test_the_first_token_is_no_sooner_than_its_prompt_is_read(plan: CapacityPlan) -> None:
    """Against the weights that a rank reads at least once."""
    weights = plan.ranks[0].memory.weights
    read = weights.attention + weights.dense + weights.gates
    shared_memory = 1e12 * plan.setup.hardware.memory_tb_s / plan.setup.sharing
    assert limit_of(plan, workload(), 1).ttft > read / shared_memory


def test_levels_have_names() -> None:
    assert str(OfferedLoad(8, concurrency=4)) == "concurrency 4"
    assert str(OfferedLoad(8, rate=0.5)) == "rate 0.5/s"
