"""The executor of a device, on a CPU: plans that another executor has executed, several under way
at a time, give the same results field by field.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from lockstep.engine.protocol.message import Sampling
from lockstep.engine.protocol.plan import Admit, Header, Mode, Section, StepPlan
from lockstep.engine.protocol.results import StepResult
from lockstep.engine.protocol.slot_table import Rows
from lockstep.engine.rank.contract import StepAbandoned
from lockstep.engine.rank.device import transfers
from lockstep.engine.rank.device.executor import DeviceExecutor
from lockstep.engine.rank.device.first_steps import compute_first_steps
from support.engine.models.checkpoints import deepseek_v3_config, qwen3_moe_config, write_checkpoint
from support.engine.rank.hand_plans import GREEDY, Driver, Request, build_executor
from support.engine.rank.launch_recorder import LaunchRecorder
from support.engine.rank.recorded_plans import executed, mixed_requests, results_of

CONFIGS = {"qwen3_moe": qwen3_moe_config(num_hidden_layers=2), "deepseek_v3": deepseek_v3_config()}
TIMES = {"waited": 0.0, "seconds": 0.0, "stalled": 0.0, "phases_f32": b""}
HOT = Sampling(temperature=0.9, top_k=40, top_p=0.9, seed=4)
BY_HOST = (
    Sampling(temperature=0.7, seed=5, presence_penalty=1.5, repetition_penalty=1.3),
    Sampling(temperature=0.0, num_logprobs=2, stop_i32=np.array([5, 77], np.int32).tobytes(), min_tokens=3),
    Sampling(
        temperature=0.0,
        bias_ids_i32=np.array([77], np.int32).tobytes(),
        bias_values_f32=np.array([100.0], np.float32).tobytes(),
    ),
    Sampling(temperature=1.0, seed=6, allowed_i32=np.array([3, 9, 40, 80], np.int32).tobytes()),
)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("device")
    return {family: write_checkpoint(folder / family, config) for family, config in CONFIGS.items()}


def assert_same(found: list[StepResult], wanted: list[StepResult]) -> None:
    assert len(found) == len(wanted)
    for mine, theirs in zip(found, wanted, strict=True):
        assert msgspec.structs.replace(mine, **TIMES) == msgspec.structs.replace(theirs, **TIMES)


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("samplings", [(GREEDY, HOT), (GREEDY, HOT, *BY_HOST)], ids=["alone", "by host"])
@pytest.mark.parametrize("family", list(CONFIGS))
def test_results_are_those_of_the_other_executor(
    family: str, samplings: tuple[Sampling, ...], depth: int, checkpoints: dict[str, Path]
) -> None:
    path, requests = checkpoints[family], mixed_requests(samplings)
    plans, wanted = executed(Driver(build_executor(path, column="reference"), requests))
    executor = build_executor(path, column="reference", as_device=True)
    assert_same(results_of(executor, requests, plans, depth), wanted)


def test_first_steps_change_nothing(checkpoints: dict[str, Path]) -> None:
    path, requests = checkpoints["deepseek_v3"], mixed_requests((GREEDY, HOT))
    plans, wanted = executed(Driver(build_executor(path, column="reference"), requests))
    executor = build_executor(path, column="reference", as_device=True)
    assert isinstance(executor, DeviceExecutor)
    compute_first_steps(executor._parts, executor._slots, executor._forward, 40, 256)
    assert_same(results_of(executor, requests, plans, 3), wanted)


def test_a_slot_that_is_given_away_takes_no_token_of_its_last_request(checkpoints: dict[str, Path]) -> None:
    """One slot, and penalties that a token of another request would change."""
    path = checkpoints["qwen3_moe"]
    strict = Sampling(temperature=0.9, seed=3, presence_penalty=2.0, frequency_penalty=1.0)
    requests = [Request([7 * number + 2, 9, 4], 4, strict, start=5 * number) for number in range(5)]
    driver = Driver(build_executor(path, column="reference", num_slots=1), requests, num_slots=1)
    plans, wanted = executed(driver)
    executor = build_executor(path, column="reference", as_device=True, num_slots=1)
    assert_same(results_of(executor, requests, plans, 3), wanted)
    settings, last = executor._settings._edits[0], requests[-1]
    assert settings.seen is not None
    assert set(settings.seen.tokens.tolist()) == {*last.prompt, *last.tokens}


def test_two_microbatches_give_the_same(checkpoints: dict[str, Path]) -> None:
    path, requests = checkpoints["deepseek_v3"], mixed_requests((GREEDY, HOT))
    make = Driver(build_executor(path, column="reference"), requests, microbatches=2)
    plans, wanted = executed(make)
    executor = build_executor(path, column="reference", as_device=True)
    assert_same(results_of(executor, requests, plans, 2), wanted)


@pytest.mark.skipif(torch.cuda.is_available(), reason="steps a model on the CPU, through the interpreter")
@pytest.mark.parametrize("family", list(CONFIGS))
def test_captured_steps_repeat_with_what_is_sent(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens are those of the other executor, whatever rows a recording is repeated with: prompts
    in chunks, beside rows that decode. No step is computed in another way.
    """
    small = {"qwen3_moe": qwen3_moe_config(num_hidden_layers=1), "deepseek_v3": deepseek_v3_config()}[family]
    path = write_checkpoint(tmp_path / family, small)
    samplings = (GREEDY, HOT, BY_HOST[1])
    requests = [
        Request([7 * number + 2, 9, 5, 11][: 2 + number], 4, sampling, start=number, chunk=3)
        for number, sampling in enumerate(samplings)
    ]
    driver = Driver(build_executor(path, num_slots=4), requests, lambda step: 8, num_slots=4)
    plans, wanted = executed(driver)
    recorder = LaunchRecorder()
    executor = build_executor(path, column="triton", as_device=True, recorder=recorder, num_slots=4)
    assert isinstance(executor, DeviceExecutor)
    monkeypatch.setattr(executor, "_compute", None)
    monkeypatch.setattr(executor._captured, "_sizes", (8,))
    sent: list[int] = []
    send = executor._upload.send
    monkeypatch.setattr(executor._upload, "send", lambda arrays: sent.append(len(arrays)) or send(arrays))
    found = results_of(executor, requests, plans, 2)
    assert sent == [7 + 1 + 7] * (1 + len(plans)), "a capture, then one delta a plan: settings come once"
    assert [mine.tokens_i32 for mine in found] == [theirs.tokens_i32 for theirs in wanted]
    assert [mine.ended_i32 for mine in found] == [theirs.ended_i32 for theirs in wanted]
    assert [mine.checksum for mine in found] == [theirs.checksum for theirs in wanted]
    assert [mine.expert_i64 for mine in found] == [theirs.expert_i64 for theirs in wanted], (
        "padding is not counted"
    )


def test_recordings_are_void_where_experts_get_replicas(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = checkpoints["qwen3_moe"]
    executor = build_executor(path, column="reference", as_device=True, recorder=LaunchRecorder())
    assert isinstance(executor, DeviceExecutor)
    steps, header = executor._captured, Header(0, 0, 7, 6, Mode.DECODE, 4)
    rows = rows_of([(9, 1)])
    assert steps.repeats(header, rows)
    monkeypatch.setattr(executor._parts.dispatcher, "num_tables", 2)
    assert not steps.repeats(header, rows) and not steps.repeats(header, rows)
    assert caplog.text.count("no step is a captured one") == 1


def rows_of(prompts: list[tuple[int, int]]) -> Rows:
    """Prompts, each with tokens before a step and in it."""
    starts, counts = np.array(prompts, np.int64).T
    return Rows(np.arange(len(prompts)), starts, counts, np.ones(len(prompts), np.bool_), 0)


def test_prompts_that_read_few_keys_are_captured(checkpoints: dict[str, Path]) -> None:
    """A row for each token reads its keys by itself: half a million in all, and 1,024 tokens."""
    path = checkpoints["qwen3_moe"]
    executor = build_executor(path, column="reference", as_device=True, recorder=LaunchRecorder())
    assert isinstance(executor, DeviceExecutor)
    steps = executor._captured
    for capacity, before, num_tokens, is_captured in (
        (1024, 0, 1023, True),
        (1024, 100, 900, True),
        (1024, 600, 1000, False),
        (64, 200_000, 3, False),
        (2048, 0, 1100, False),
    ):
        header, rows = Header(0, 0, 7, 6, Mode.MIXED, capacity), rows_of([(before, num_tokens)])
        assert steps.repeats(header, rows) == is_captured, (capacity, before, num_tokens)
        assert not steps.repeats(msgspec.structs.replace(header, microbatches=2), rows)


class Never:
    """A mark that the device does not come past."""

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        raise AssertionError("nobody waits for it")


def test_a_step_that_does_not_end_is_abandoned(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = build_executor(checkpoints["qwen3_moe"], column="reference", as_device=True)
    assert isinstance(executor, DeviceExecutor)
    monkeypatch.setattr(transfers.HostCopies, "copy", lambda *_: Never())
    executor.submit(StepPlan(Header(0, 0, 7, -1, Mode.DECODE, 4), Section(rebase=True)))
    assert executor.take() is None, "it is under way"
    executor._deadline = 0.0
    with pytest.raises(StepAbandoned, match="step 7 has not ended after 0 s"):
        executor.take()
    executor.begin_epoch(1, ())
    assert executor.take() is None, "an epoch has no steps of another"


def test_pages_that_a_later_step_writes_are_not_told_of(checkpoints: dict[str, Path]) -> None:
    """A plan publishes a page, and the next one, begun before its result, gives it to another."""
    executor = build_executor(checkpoints["qwen3_moe"], column="reference", as_device=True)
    executor.stage(0, np.arange(2, 10, dtype=np.int32).tobytes())
    executor.stage(1, np.arange(3, 9, dtype=np.int32).tobytes())
    pages = [np.array([number], np.int32).tobytes() for number in (4, 5)]
    first = Section(
        rebase=True,
        admit=(Admit(0, 0, 0, 0, 9, pages[0], GREEDY),),
        extend_pairs=np.array([0, 8], np.int32).tobytes(),
        publish_i32=np.array([4, 5], np.int32).tobytes(),
        publish_h128=bytes(range(32)),
    )
    second = Section(
        free_i32=np.zeros(1, np.int32).tobytes(),
        admit=(Admit(1, 1, 0, 0, 9, pages[1], GREEDY),),
        extend_pairs=np.array([1, 6], np.int32).tobytes(),
    )
    for step, section in enumerate((first, second)):
        executor.submit(StepPlan(Header(0, 0, step, step - 1, Mode.MIXED, 16), section))
    assert executor.published() == (b"", b""), "no result is here"
    assert executor.take() is not None
    assert executor.published() == (pages[0], bytes(range(16)))
