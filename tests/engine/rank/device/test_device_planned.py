"""The executor of a device in Triton's interpreter under plans of a real planner, with a model and
pages in FP8, and one in float32: tokens and state are those of the reference on a host.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from lockstep.engine.protocol.message import Sampling
from lockstep.engine.protocol.plan import Mode
from lockstep.engine.rank.device.executor import DeviceExecutor
from lockstep.engine.rank.executor import Executor
from support.engine.models.checkpoints import deepseek_v3_config, qwen3_moe_config, write_checkpoint
from support.engine.models.fp8_checkpoints import write_pair
from support.engine.rank.hand_plans import GREEDY, build_executor
from support.engine.rank.launch_recorder import LaunchRecorder
from support.engine.rank.planned_steps import Asked, executed_again, planned
from support.engine.text.byte_vocabulary import END, byte_vocabulary

HOT = Sampling(temperature=0.9, top_k=40, top_p=0.9, seed=4)
STRICT = Sampling(temperature=0.0, presence_penalty=1.5, repetition_penalty=1.3, num_logprobs=2)
ENDS = Sampling(temperature=0.0, stop_i32=np.array([END], np.int32).tobytes())
LETTERS = "%llguidance {}\nstart: /[a-f]{7,9}/"
BEGIN = [7, 200, 31, 5, 90, 11, 64, 2, 150, 77, 33]  # a page and some
REQUESTS = [
    Asked(0, BEGIN, 7, STRICT),
    Asked(0, [40, 41, 9, 9, 9, 12, 3], 8, ENDS, LETTERS),
    Asked(8, [*BEGIN, 3], 3, HOT),
    Asked(8, [99, 12, 13], 3, GREEDY),
]
CAPTURED = 4
SEED = 29
"""Greedy choices of this model are 0.09 apart at least; log-probabilities differ by up to 0.07."""


pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="steps a model on the CPU, through the interpreter"
)


def test_plans_of_a_planner_give_the_tokens_of_the_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = write_pair(tmp_path, deepseek_v3_config(vocab_size=END + 1, num_hidden_layers=2), seed=SEED)
    check(functools.partial(build_executor, path, kv_format="fp8", keep_fp8=True), 0.15, monkeypatch)


def test_plans_for_a_model_of_grouped_queries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_checkpoint(tmp_path / "model", qwen3_moe_config(vocab_size=END + 1, num_hidden_layers=1))
    check(functools.partial(build_executor, path), 1e-3, monkeypatch)


def check(build: Callable[..., Executor], tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans by the reference on a host, executed again by the executor of a device: chunks, a
    prefix that is found, preemption, penalties, a grammar, a rebase, two plans under way.
    ``tolerance`` of log-probabilities.
    """
    vocabulary = byte_vocabulary()
    host = build(column="reference", vocabulary=vocabulary)
    found = planned(host, REQUESTS, num_pages=4, most_tokens=8, rebase_at=3)
    assert any(start.num_cached for start in found.starts), "a prefix was found"
    assert any(start.preemptions for start in found.starts), "pages ran out"
    assert sum(plan.section.rebase for plan in found.plans) == 2
    assert {plan.header.mode for plan in found.plans} == {Mode.DECODE, Mode.MIXED}
    sizes = {plan.header.capacity for plan in found.plans}
    assert CAPTURED in sizes and max(sizes) > CAPTURED, "captured steps, and others"

    recorder = LaunchRecorder()
    executor = build(column="triton", vocabulary=vocabulary, as_device=True, recorder=recorder)
    assert isinstance(executor, DeviceExecutor)
    monkeypatch.setattr(executor._captured, "_sizes", (CAPTURED,))
    again = executed_again(executor, found.events, depth=2)
    for name in ("tokens_i32", "ended_i32", "checksum", "expert_i64"):
        assert [getattr(mine, name) for mine in again] == [getattr(theirs, name) for theirs in found.results]
    mine, theirs = (
        [line.chosen for result in results for line in result.logprobs] for results in (again, found.results)
    )
    assert len(mine) == 7
    np.testing.assert_allclose(mine, theirs, atol=tolerance)
