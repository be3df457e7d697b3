"""After the first steps of a rank on a GPU the layers of no plan need a kernel that is not compiled
yet: real models on tensors without memory, where launches are only noted.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from lockstep.engine.protocol.buckets import BUCKETS, bucket_over
from lockstep.engine.protocol.slot_table import Rows
from lockstep.engine.rank.device.executor import DeviceExecutor
from lockstep.engine.rank.device.first_steps import compute_first_steps
from lockstep.engine.rank.device.step_arrays import LaneArrays
from lockstep.engine.rank.halves import whole
from support.engine.rank.executors_without_memory import MAX_LEN, MAX_TOKENS, ROWS, executor_of
from support.engine.rank.kernel_variants import noting_variants

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="notes launches of the interpreter")

PLANS = 200
# Layers that hold one of each kind, and a bound on the variants.
MODELS = {"qwen3-30b-a3b": (1, 30), "deepseek-v3": (4, 60), "gpt-oss-120b": (2, 40)}


def capture(executor: DeviceExecutor, size: int) -> None:
    """Computes a step of ``size`` rows as ``CapturedDecode`` does when it captures one."""
    decode = executor._decode
    idle = Rows(*(np.zeros(0, np.int64),) * 3, np.zeros(0, np.bool_), 0)
    sent = decode.send(size, idle, idle.samples, [np.zeros(0, np.int64), np.zeros(0, np.int32)], [])
    decode._sample(decode._layers(size, *sent[:6]), sent[6:13])


def random_rows(dice: random.Random) -> Rows:
    """Decode rows, prompts of every length, or both; some with cached tokens."""
    num_decode = dice.choice([0, 0, 1, 3, 17, 60, 130, 250])
    num_prompts = dice.choice([0, 1, 1, 2, 4]) or int(num_decode == 0)
    prompts = [dice.randint(2, dice.choice([8, 100, 1500])) for _ in range(num_prompts)]
    counts = np.array([1] * num_decode + prompts, np.int64)
    cached = [dice.choice([0, dice.randint(1, 2000)]) for _ in prompts]
    starts = np.array([dice.randint(1, 3000) for _ in range(num_decode)] + cached, np.int64)
    return Rows(np.arange(len(counts)), starts, counts, np.ones(len(counts), np.bool_), num_decode)


def compute(executor: DeviceExecutor, rows: Rows) -> None:
    lane = LaneArrays(rows, rows.samples, whole(rows), executor._history, executor._slots.scratch)
    num_tokens = int(rows.counts.sum())
    executor._forward.announce(num_tokens, bucket_over(num_tokens))
    num_pages = -(-int(rows.ends.max()) // executor._parts.pool.page_size)
    sent = executor._upload.send(lane.arrays)
    executor._layers(lane.on_device(sent), num_pages, None, torch.empty(0))


@pytest.mark.parametrize("name", MODELS)
def test_no_plan_after_the_first_steps_needs_another_kernel(name: str) -> None:
    num_layers, most = MODELS[name]
    executor, dice = executor_of(name, num_layers), random.Random(5)
    with noting_variants() as variants, torch.inference_mode():
        compute_first_steps(executor._parts, executor._slots, executor._forward, MAX_TOKENS, MAX_LEN)
        for size in BUCKETS:
            if 0 < size <= ROWS:
                capture(executor, size)
        known = set(variants)
        for number in range(PLANS):
            rows = random_rows(dice)
            compute(executor, rows)
            found = (number, rows.counts.tolist(), rows.starts.tolist())
            assert variants == known, f"plan {found}: {sorted(variants - known)}"
    assert len(known) <= most, sorted(known)
