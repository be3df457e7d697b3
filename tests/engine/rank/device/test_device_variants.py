"""After the first steps of a rank on a GPU no plan needs a kernel that is not compiled yet,
whatever requests ask for: real models on tensors without memory, where launches are only noted.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from lockstep.engine.protocol.buckets import BUCKETS, MOST_CAPTURED, bucket_over, most_tokens
from lockstep.engine.protocol.message import Sampling
from lockstep.engine.protocol.plan import Header, Mode, Section
from lockstep.engine.protocol.slot_table import Rows
from lockstep.engine.rank.device.executor import DeviceExecutor
from lockstep.engine.rank.device.first_steps import compute_first_steps
from lockstep.engine.rank.prompt_logprobs import score_slice
from support.engine.rank.executors_without_memory import MAX_LEN, MAX_TOKENS, ROWS, executor_of
from support.engine.rank.kernel_variants import noting_variants

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="notes launches of the interpreter")

PLANS, FEWER = 200, 60
CAPTURED = tuple(size for size in BUCKETS if 0 < size <= MOST_CAPTURED)


@dataclass(frozen=True)
class Case:
    """The first ``num_layers`` layers of a model, which hold one of each kind; ``most`` variants.
    ``dispatch``: over a rack. ``tensor``: ranks that split layers. ``halves``: every second step is
    two microbatches.
    """

    model: str
    num_layers: int
    most: int
    dispatch: str = "local"
    tensor: int = 1
    halves: bool = False
    max_len: int = MAX_LEN
    plans: int = FEWER

    def __str__(self) -> str:
        return f"{self.model}-{self.dispatch}-{self.tensor}-{self.max_len}"

    def executor(self) -> DeviceExecutor:
        capacities = tuple(-(-most // self.tensor) for most in (MAX_TOKENS, most_tokens(MAX_TOKENS)))
        capacities = capacities[: 1 + self.halves]
        facts = self.dispatch, capacities, self.tensor, self.max_len
        return executor_of(self.model, self.num_layers, *facts)


CASES = (
    Case("qwen3-30b-a3b", 1, 35, plans=PLANS),
    Case("qwen3-30b-a3b", 1, 45, halves=True, max_len=40960),
    Case("qwen3-30b-a3b", 1, 45, dispatch="all_gather", tensor=2),
    Case("deepseek-v3", 4, 70, plans=PLANS),
    Case("deepseek-v3", 4, 70, dispatch="all_gather", halves=True),
    Case("deepseek-v3", 4, 70, dispatch="flashinfer", halves=True),
    Case("deepseek-v3", 4, 70, dispatch="deepep"),
    Case("deepseek-v3.2", 4, 80),
    Case("gpt-oss-120b", 2, 40, plans=PLANS),
    Case("mistral-small-4", 1, 60, plans=PLANS),
)


def capture(executor: DeviceExecutor, size: int) -> None:
    """Computes a step of ``size`` rows as ``CapturedSteps`` does when it captures one."""
    steps = executor._captured
    idle = Rows(*(np.zeros(0, np.int64),) * 3, np.zeros(0, np.bool_), 0)
    sent = steps.send(size, idle, idle.samples, [np.zeros(0, np.int64), np.zeros(0, np.int32)], [], True)
    hidden_BD = steps._layers(size, *sent[:7])
    if steps.samples(size):
        steps._sample(hidden_BD, sent[7:14])


def random_rows(dice: random.Random, max_len: int) -> Rows:
    """Decode rows, prompts of every length, or both; some with cached tokens. Of many prompts,
    one may be long.
    """
    num_decode = dice.choice([0, 0, 1, 3, 17, 60, 130, 250])
    num_prompts = dice.choice([0, 1, 1, 2, 4, 90]) or int(num_decode == 0)
    num_prompts = min(num_prompts, ROWS - num_decode)
    long = [dice.randint(2, dice.choice([8, 100, 1500])) for _ in range(min(num_prompts, 4))]
    prompts = [dice.randint(2, 8) for _ in range(num_prompts - len(long))] + long
    counts = np.array([1] * num_decode + prompts, np.int64)
    cached = [dice.choice([0, dice.randint(1, 2000)]) for _ in prompts]
    most = dice.choice([300, max_len - 1])
    starts = np.array([dice.randint(1, most) for _ in range(num_decode)] + cached, np.int64)
    return Rows(np.arange(len(counts)), starts, counts, np.ones(len(counts), np.bool_), num_decode)


def ids(values: list[int]) -> bytes:
    return np.array(values, np.int32).tobytes()


def random_sampling(dice: random.Random) -> Sampling:
    """Each thing that a request may ask for, or not."""
    asks: dict[str, Any] = {
        "temperature": dice.choice([0.0, 0.7]),
        "top_k": dice.choice([0, 40]),
        "top_p": dice.choice([1.0, 0.9]),
        "presence_penalty": dice.choice([0.0, 1.0]),
        "num_logprobs": dice.choice([-1, 0, 1, 20]),
        "min_tokens": dice.choice([0, 9]),
        "stop_i32": ids([2] * dice.randint(1, 20)),
    }
    if dice.random() < 0.3:
        num = dice.choice([1, 16, 300])
        asks |= {"bias_ids_i32": ids(list(range(num))), "bias_values_f32": bytes(4 * num)}
    if dice.random() < 0.3:
        asks["bad_words_i32"] = ids([7, -1] * dice.choice([1, 16]))
    if dice.random() < 0.3:
        asks["allowed_i32"] = ids([5, 500])
    return Sampling(**asks)


def sample(executor: DeviceExecutor, rows: Rows, hidden_TD: torch.Tensor, dice: random.Random) -> None:
    """Draws the tokens of rows that ask for random things, and scores a prompt."""
    asking = dice.random() < 0.8
    for slot in rows.slots.tolist():
        history = np.arange(dice.choice([1, 16, 700]), dtype=np.int32)
        sampling = random_sampling(dice) if asking else Sampling()
        executor._settings.admit(slot, sampling, history, dice.choice([0, 1]))
    drawing = executor._drawing(rows, np.arange(len(rows.slots)))
    sent = executor._upload.send([rows.counts.cumsum() - 1, *drawing.arrays()])
    executor._choose(0, hidden_TD, sent, drawing)
    num = min(dice.choice([1, 2, 16]), len(hidden_TD))
    next_T = torch.zeros(num, dtype=torch.int64, device=hidden_TD.device)
    score_slice(executor._parts, hidden_TD[:num], next_T, dice.choice([0, 1, 5]), dice.choice([False, True]))


def compute(executor: DeviceExecutor, rows: Rows, microbatches: int) -> torch.Tensor:
    num_tokens, none = int(rows.counts.sum()), np.zeros(0, np.int64)
    header = Header(0, 0, 1, 0, Mode.MIXED, bucket_over(num_tokens), microbatches)
    drawing = executor._drawing(rows, none)
    return executor._compute(header, rows, rows.samples, drawing, Section())[0]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_plan_after_the_first_steps_needs_another_kernel(case: Case) -> None:
    """With captures or without: a stage of a pipeline has none."""
    executor, dice = case.executor(), random.Random(5)
    with noting_variants() as variants, torch.inference_mode():
        compute_first_steps(executor._parts, executor._slots, executor._forward, MAX_TOKENS, case.max_len)
        known = set(variants)
        for number in range(case.plans):
            rows = random_rows(dice, case.max_len)
            sample(executor, rows, compute(executor, rows, 1 + number % 2 * case.halves), dice)
            found = (number, rows.counts.tolist(), rows.starts.tolist())
            assert variants == known, f"plan {found}: {sorted(variants - known)}"
        for size in CAPTURED if case.plans == PLANS else ():
            capture(executor, size)
            assert variants == known, f"captured for {size} rows: {sorted(variants - known)}"
    assert len(known) <= case.most, sorted(known)
