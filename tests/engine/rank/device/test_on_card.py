"""The executor of a device, on a card: the tokens of the reference; no step waits for the device
while it begins, but for tokens that its rows follow from; captured steps give what plain ones do.
Rows that need the host are tried on the CPU too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import structs

from lockstep.engine.protocol.buckets import bucket_over
from lockstep.engine.protocol.message import Sampling
from lockstep.engine.protocol.plan import Mode, StepPlan
from lockstep.engine.rank.device.graphs import CudaRecorder
from lockstep.engine.rank.executor import Executor
from support.engine.models.checkpoints import deepseek_v3_config, qwen3_moe_config, write_checkpoint
from support.engine.rank.hand_plans import GREEDY, NUM_SLOTS, Driver, build_executor
from support.engine.rank.planned_steps import Asked, executed_again, planned
from support.engine.rank.recorded_plans import BY_HOST, executed, mixed_requests, results_of
from support.engine.text.byte_vocabulary import END, byte_vocabulary

CONFIGS = {"qwen3_moe": qwen3_moe_config(), "deepseek_v3": deepseek_v3_config()}
HOT = Sampling(temperature=0.9, top_k=40, top_p=0.9, seed=4)
ASKS = Sampling(temperature=0.9, seed=8, num_logprobs=3)
LETTERS = "%llguidance {}\nstart: /[a-f]{7,9}/"

needs_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card")
PLACES = pytest.mark.parametrize("place", ["cpu", pytest.param("cuda", marks=needs_card)])


@contextmanager
def no_waits(place: str) -> Iterator[None]:
    """Copies that wait for a card, and reads of it, are errors."""
    if place == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if place == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def device_executor(path: Path, place: str, captured: bool = False, **more: Any) -> Executor:
    device = torch.device(place)
    recorder = CudaRecorder(device) if captured else None
    column = "triton" if place == "cuda" else "reference"
    return build_executor(path, column=column, as_device=True, recorder=recorder, device=device, **more)


def _within(plan: StepPlan) -> StepPlan:
    """The plan with the capacity of the largest step that is captured."""
    return StepPlan(structs.replace(plan.header, capacity=bucket_over(NUM_SLOTS)), plan.section)


def check_tokens(
    path: Path, samplings: tuple[Sampling, ...], place: str, captured: bool
) -> tuple[list[float], list[float]]:
    """Log-probabilities that rows ask for: found, and wanted."""
    requests = mixed_requests(samplings)
    plans, wanted = executed(Driver(build_executor(path, column="reference"), requests))
    plans = [_within(plan) if plan.header.mode == Mode.DECODE else plan for plan in plans]
    plans[0] = StepPlan(plans[0].header, structs.replace(plans[0].section, rebase=True))  # they come twice
    executor = device_executor(path, place, captured)
    results_of(executor, requests, plans, 1)  # compiles kernels
    with no_waits(place):
        found = results_of(executor, requests, plans, 2)
    assert [mine.tokens_i32 for mine in found] == [theirs.tokens_i32 for theirs in wanted]
    assert [mine.expert_i64 for mine in found] == [theirs.expert_i64 for theirs in wanted]
    chosen = [[line.chosen for each in results for line in each.logprobs] for results in (found, wanted)]
    return chosen[0], chosen[1]


@needs_card
@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("family", list(CONFIGS))
def test_tokens_are_those_of_the_reference(family: str, captured: bool, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / family, CONFIGS[family])
    check_tokens(path, (GREEDY, HOT), "cuda", captured)


@PLACES
@pytest.mark.parametrize("family", list(CONFIGS))
def test_rows_that_need_the_host_wait_for_no_copy(family: str, place: str, tmp_path: Path) -> None:
    """Penalties, biases, stop ids that come later, sets of tokens, and log-probabilities."""
    path = write_checkpoint(tmp_path / family, CONFIGS[family])
    found, wanted = check_tokens(path, (GREEDY, ASKS, *BY_HOST), place, captured=place == "cuda")
    assert found == pytest.approx(wanted, abs=1e-3) and found


@PLACES
def test_masks_of_grammars_wait_for_no_copy(place: str, tmp_path: Path) -> None:
    config, vocabulary = deepseek_v3_config(vocab_size=END + 1), byte_vocabulary()
    path = write_checkpoint(tmp_path / "model", config)
    requests = [
        Asked(0, [40, 41, 9, 9, 12, 3], 8, ASKS, LETTERS),
        Asked(0, [7, 200, 31, 5], 6, GREEDY),
        Asked(2, [99, 12, 13], 6, BY_HOST[0]),
    ]
    host = build_executor(path, column="reference", vocabulary=vocabulary)
    wanted = planned(host, requests, num_pages=64, most_tokens=32, rebase_at=-1)
    executor = device_executor(path, place, vocabulary=vocabulary)
    executed_again(executor, wanted.events, depth=2)  # compiles kernels
    with no_waits(place):
        found = executed_again(executor, wanted.events, depth=2)
    assert [mine.tokens_i32 for mine in found] == [theirs.tokens_i32 for theirs in wanted.results]
