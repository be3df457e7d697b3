"""The executor of a device, on a card: the tokens of the reference; no step waits for the device
while it begins; captured steps give what plain ones do.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from msgspec import structs

from lockstep.engine.protocol.buckets import bucket_over
from lockstep.engine.protocol.message import Sampling
from lockstep.engine.protocol.plan import Mode, StepPlan
from lockstep.engine.rank.device.graphs import CudaRecorder
from support.engine.models.checkpoints import deepseek_v3_config, qwen3_moe_config, write_checkpoint
from support.engine.rank.hand_plans import GREEDY, NUM_SLOTS, Driver, build_executor
from support.engine.rank.recorded_plans import executed, mixed_requests, results_of

CONFIGS = {"qwen3_moe": qwen3_moe_config(), "deepseek_v3": deepseek_v3_config()}
HOT = Sampling(temperature=0.9, top_k=40, top_p=0.9, seed=4)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card")


def _within(plan: StepPlan) -> StepPlan:
    """The plan with the capacity of the largest step that is captured."""
    return StepPlan(structs.replace(plan.header, capacity=bucket_over(NUM_SLOTS)), plan.section)


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("family", list(CONFIGS))
def test_tokens_are_those_of_the_reference(family: str, captured: bool, tmp_path: Path) -> None:
    path, requests = write_checkpoint(tmp_path / family, CONFIGS[family]), mixed_requests((GREEDY, HOT))
    plans, wanted = executed(Driver(build_executor(path, column="reference"), requests))
    plans = [_within(plan) if plan.header.mode == Mode.DECODE else plan for plan in plans]
    card = torch.device("cuda")
    recorder = CudaRecorder(card) if captured else None
    executor = build_executor(path, column="triton", as_device=True, recorder=recorder, device=card)
    results_of(executor, requests, plans, 1)  # compiles kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = results_of(executor, requests, plans, 2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [mine.tokens_i32 for mine in found] == [theirs.tokens_i32 for theirs in wanted]
    assert [mine.expert_i64 for mine in found] == [theirs.expert_i64 for theirs in wanted]
