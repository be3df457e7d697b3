"""The executor by hand-made plans: what it computes does not depend on how a planner cuts and mixes
the work.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from lockstep.engine.protocol.arrays import Int32, Int64
from lockstep.engine.protocol.message import Sampling
from lockstep.engine.protocol.plan import Admit, Header, Mode, Section, StepPlan
from lockstep.engine.rank.executor import Executor
from support.engine.models.checkpoints import deepseek_v3_config, qwen3_moe_config, write_checkpoint
from support.engine.rank.hand_plans import GREEDY, PAGE_SIZE, Driver, Request, build_executor
from support.engine.rank.run_step import run_step

CONFIGS = {"qwen3_moe": qwen3_moe_config(), "deepseek_v3": deepseek_v3_config()}
Make = Callable[[], Executor]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("executor")
    return {family: write_checkpoint(folder / family, config) for family, config in CONFIGS.items()}


@pytest.fixture(params=list(CONFIGS))
def path(request: pytest.FixtureRequest, checkpoints: dict[str, Path]) -> Path:
    return checkpoints[request.param]


@pytest.fixture
def qwen(checkpoints: dict[str, Path]) -> Path:
    return checkpoints["qwen3_moe"]


def _prompts(count: int = 6, seed: int = 3) -> list[list[int]]:
    draw = np.random.default_rng(seed)
    return [draw.integers(2, 320, int(length)).tolist() for length in draw.integers(1, 60, count)]


def _alone(path: Path, request: Request) -> list[int]:
    return Driver(build_executor(path), [request]).run()[0]


def _transformers(path: Path, prompt: list[int], num_new: int) -> list[int]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(num_new):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_greedy_equals_transformers(path: Path) -> None:
    prompts = _prompts(3)
    requests = [Request(prompt, 8) for prompt in prompts]
    assert Driver(build_executor(path), requests).run() == [
        _transformers(path, prompt, 8) for prompt in prompts
    ]


def test_chunked_batched_held_and_late_equal_alone(path: Path) -> None:
    prompts = _prompts()
    alone = [_alone(path, Request(prompt, 24)) for prompt in prompts]
    ways = {
        "batched": [Request(prompt, 24) for prompt in prompts],
        "chunked": [Request(prompt, 24, chunk=7) for prompt in prompts],
        "arriving while others decode": [
            Request(prompt, 24, start=3 * i, chunk=5 + i) for i, prompt in enumerate(prompts)
        ],
        "held and resumed": [
            Request(prompt, 24, start=i, held=frozenset(range(8 + i, 15))) for i, prompt in enumerate(prompts)
        ],
    }
    for name, requests in ways.items():
        driver = Driver(build_executor(path), requests, seed=len(name))
        assert driver.run() == alone, name
        assert len({page for request in requests for page in request.pages}) >= sum(
            len(p) // PAGE_SIZE for p in prompts
        )


def test_seeds_give_the_same_tokens_in_any_batch(qwen: Path) -> None:
    prompts = _prompts(4)
    hot = [Sampling(temperature=1.3, top_p=0.9, top_k=50, seed=seed) for seed in (1, 2, 1, -5)]
    alone = [
        _alone(qwen, Request(prompt, 16, sampling)) for prompt, sampling in zip(prompts, hot, strict=True)
    ]
    mixed = [
        Request(prompt, 16, sampling, start=i)
        for i, (prompt, sampling) in enumerate(zip(prompts, hot, strict=True))
    ]
    mixed.insert(2, Request(prompts[0], 20, GREEDY))
    tokens = Driver(build_executor(qwen), mixed).run()
    assert tokens[:2] + tokens[3:] == alone
    other = _alone(qwen, Request(prompts[0], 16, Sampling(temperature=1.3, seed=99)))
    assert other != alone[0]


def test_an_emitted_part_counts_as_output(qwen: Path) -> None:
    """A request that comes back after a preemption goes on as if nothing had happened, penalties
    and seeds included.
    """
    sampling = Sampling(
        temperature=0.8,
        seed=4,
        presence_penalty=1.5,
        frequency_penalty=0.5,
        repetition_penalty=1.3,
        min_tokens=30,
    )
    prompt = _prompts(1)[0]
    whole = _alone(qwen, Request(prompt, 20, sampling))
    assert whole != _alone(qwen, Request(prompt, 20, Sampling(temperature=0.8, seed=4)))
    executor = build_executor(qwen)
    for cut in (1, 7, 19):
        history = prompt + whole[:cut]
        executor.stage(0, np.asarray(history, np.int32).tobytes())
        pages = np.arange(32, dtype=np.int32).tobytes()
        admit = Admit(5, 0, 0, cut, len(prompt) + 20, pages, sampling)
        section = Section(
            rebase=True, admit=(admit,), extend_pairs=np.array([5, len(history)], np.int32).tobytes()
        )
        tokens = list(whole[:cut])
        for step in range(20 - cut):
            plan = StepPlan(
                Header(0, 0, step, step - 1, Mode.MIXED, 512), section if step == 0 else Section()
            )
            tokens += np.frombuffer(run_step(executor, plan).tokens_i32, np.int32).tolist()
        assert tokens == whole, f"cut at {cut}"


def test_cached_pages_are_read(qwen: Path) -> None:
    """Admitted with two pages that another slot has written, a prompt needs the rest alone."""
    prompt = _prompts(8)[0][:2] + _prompts(8, seed=5)[1] + list(range(2, 30))
    expected = _alone(qwen, Request(prompt, 6))
    executor = build_executor(qwen)
    driver = Driver(executor, [Request(prompt, 6)])
    driver.run()
    shared = driver.requests[0].pages[:2]
    executor.stage(9, np.asarray(prompt, np.int32).tobytes())
    others = [page for page in range(100, 140) if page not in shared][:20]
    pages = np.asarray([*shared, *others], np.int32).tobytes()
    admit = Admit(1, 9, 2 * PAGE_SIZE, 0, len(prompt) + 6, pages, GREEDY)
    extend = np.array([1, len(prompt) - 2 * PAGE_SIZE], np.int32).tobytes()
    section = Section(rebase=True, admit=(admit,), extend_pairs=extend)
    tokens: list[int] = []
    for step in range(6):
        result = run_step(
            executor,
            StepPlan(Header(0, 0, step, step - 1, Mode.MIXED, 512), section if step == 0 else Section()),
        )
        tokens += np.frombuffer(result.tokens_i32, np.int32).tolist()
    assert tokens == expected


def test_a_row_at_its_limit_emits_nothing_and_disturbs_nobody(qwen: Path) -> None:
    """The planner frees a row in time; with drafts a row may reach its limit early and idle until
    it is freed.
    """
    prompts = _prompts(2)
    alone = [_alone(qwen, Request(prompt, count)) for prompt, count in zip(prompts, (3, 9), strict=True)]
    executor = build_executor(qwen)
    admits, extends = [], []
    for slot, (prompt, count) in enumerate(zip(prompts, (3, 9), strict=True)):
        executor.stage(slot, np.asarray(prompt, np.int32).tobytes())
        num_pages = -(-(len(prompt) + count - 1) // PAGE_SIZE)
        pages = np.arange(slot * 100, slot * 100 + num_pages, dtype=np.int32).tobytes()
        admits.append(Admit(slot, slot, 0, 0, len(prompt) + count, pages, GREEDY))
        extends += [slot, len(prompt)]
    section = Section(admit=tuple(admits), extend_pairs=np.asarray(extends, np.int32).tobytes())
    tokens: list[list[int]] = [[], []]
    for step in range(9):
        result = run_step(
            executor,
            StepPlan(Header(0, 0, step, step - 1, Mode.MIXED, 512), section if step == 0 else Section()),
        )
        flat = np.frombuffer(result.tokens_i32, np.int32).tolist()
        counts = list(result.counts_u8) or [1, 1]
        assert counts == ([1, 1] if step < 3 else [0, 1])
        for row, count in enumerate(counts):
            tokens[row] += [flat.pop(0) for _ in range(count)]
    assert tokens == alone


def test_ended_rows_min_tokens_and_logprobs(qwen: Path) -> None:
    prompts = _prompts(2)
    alone = [_alone(qwen, Request(prompt, 12)) for prompt in prompts]
    stop = np.array([alone[0][4], 317], np.int32).tobytes()
    sampling = Sampling(temperature=0.0, stop_i32=stop, num_logprobs=3)
    driver = Driver(build_executor(qwen), [Request(prompts[0], 12, sampling), Request(prompts[1], 12)])
    tokens = driver.run()
    assert tokens == alone  # a rank reports the end and goes on
    row = 0 if driver.plans[0].section.admit[0].slot < driver.plans[0].section.admit[1].slot else 1
    first = alone[0].index(alone[0][4])
    ended = [
        number
        for number, result in enumerate(driver.results)
        if row in np.frombuffer(result.ended_i32, np.int32)
    ]
    assert (
        ended == [number for number, token in enumerate(alone[0]) if token in (alone[0][4], 317)]
        and ended[0] == first
    )
    for number, result in enumerate(driver.results):
        (line,) = result.logprobs
        ids, values = np.frombuffer(line.top_ids_i32, np.int32), np.frombuffer(line.top_f32, np.float32)
        assert (
            (line.row, line.index) == (row, 0) and ids[0] == alone[0][number] and line.chosen == values[0] < 0
        )
        assert (np.diff(values) <= 0).all() and len(ids) == len(values) == 3

    late = Sampling(temperature=0.0, stop_i32=stop, min_tokens=first + 1)
    masked = _alone(qwen, Request(prompts[0], first + 1, late))
    assert masked[:first] == alone[0][:first] and masked[first] != alone[0][first]


def test_bias(qwen: Path) -> None:
    prompts = _prompts(2)
    biased = Sampling(
        temperature=0.0,
        bias_ids_i32=np.array([77], np.int32).tobytes(),
        bias_values_f32=np.array([100.0], np.float32).tobytes(),
    )
    tokens = Driver(build_executor(qwen), [Request(prompts[0], 5, biased), Request(prompts[1], 5)]).run()
    assert tokens == [[77] * 5, _alone(qwen, Request(prompts[1], 5))]


OPS = ["edit_logits", "allow_only", "sample", "logprobs"]


class OneToken:
    """Grammars and masks by which every row may sample ``ONLY``."""

    ONLY = 70

    def begin(self, slots: Int64) -> OneToken:
        return self

    def take(self, slots: Int64) -> tuple[Int64, Int32]:
        bits = np.zeros((len(slots), 10), np.int32)
        bits[:, self.ONLY // 32] = 1 << self.ONLY % 32
        return np.arange(len(slots)), bits

    def rebase(self, staged_from: int) -> None: ...

    def admit(self, slot: int, staged: int, stop_ids: Int32) -> None: ...

    def observe(self, slots: Int64, tokens: Int64) -> None: ...


def test_tokens_are_drawn_by_the_column_of_the_model(qwen: Path) -> None:
    executor = build_executor(qwen)
    model, called = executor.model, []

    def noted(name: str) -> Callable[..., object]:
        real = getattr(model.ops, name)
        return lambda *arguments: (called.append(name), real(*arguments))[1]

    noted_ops = copy.copy(model.ops)
    for name in OPS:
        setattr(noted_ops, name, noted(name))
    model.ops = noted_ops
    executor._parts = dataclasses.replace(executor._parts, grammars=OneToken())
    sampling = Sampling(temperature=0.0, num_logprobs=1, presence_penalty=1.0)
    assert Driver(executor, [Request(_prompts(1)[0], 2, sampling)]).run() == [[OneToken.ONLY] * 2]
    assert called == OPS * 2


def test_empty_steps_counts_and_checksums(qwen: Path) -> None:
    executor = build_executor(qwen)
    empty = run_step(
        executor, StepPlan(Header(0, 0, 0, -1, Mode.DECODE, 4, checksum=True, counts=True), Section())
    )
    assert (
        empty.tokens_i32 == b""
        and empty.checksum == 0
        and not np.frombuffer(empty.expert_i64, np.int64).any()
    )
    prompt = _prompts(1)[0]
    driver = Driver(executor, [Request(prompt, 4)])
    driver.run()
    counts = [np.frombuffer(result.expert_i64, np.int64).reshape(3, 8) for result in driver.results]
    assert [int(count.sum()) for count in counts] == [3 * 2 * len(prompt), 6, 6, 6]
    assert len({result.checksum for result in driver.results}) == 4
    assert all(result.seconds > 0 and result.waited == 0 for result in driver.results)


def test_more_tokens_than_pages_is_refused(qwen: Path) -> None:
    executor = build_executor(qwen)
    executor.stage(0, np.arange(20, dtype=np.int32).tobytes())
    admit = Admit(0, 0, 0, 0, 40, np.array([1, 2], np.int32).tobytes(), GREEDY)
    section = Section(admit=(admit,), extend_pairs=np.array([0, 20], np.int32).tobytes())
    with pytest.raises(AssertionError, match="slots \\[0\\]: more tokens than pages"):
        run_step(executor, StepPlan(Header(0, 0, 0, -1, Mode.MIXED, 512), section))
