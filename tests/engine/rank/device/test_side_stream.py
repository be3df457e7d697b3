"""Results leave on a stream of their own: whichever stream is ahead, they are those of the other
executor; and they are not where a wait is left out.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch

from lockstep.engine.models import registry
from lockstep.engine.protocol.message import Sampling
from lockstep.engine.protocol.results import StepResult
from lockstep.engine.rank.device import executor as device_executor, transfers
from lockstep.engine.rank.device.executor import DeviceExecutor
from lockstep.engine.rank.device.transfers import CudaSideStream, Download, Fetched
from support.engine.models.checkpoints import qwen3_moe_config, write_checkpoint
from support.engine.rank.hand_plans import GREEDY, Driver, Request, build_executor
from support.engine.rank.late_device import LateOps
from support.engine.rank.launch_recorder import LaunchRecorder
from support.engine.rank.recorded_plans import executed, mixed_requests, results_of
from support.engine.rank.two_streams import WAITS, QueuedRecorder, TwoStreams

CARD, CPU = torch.device("cuda"), torch.device("cpu")
TIMES = {"waited": 0.0, "seconds": 0.0, "stalled": 0.0, "phases_f32": b""}
SAMPLINGS = GREEDY, Sampling(temperature=0.9, top_k=40, seed=4), Sampling(temperature=0.0, num_logprobs=2)
FIRST = pytest.mark.parametrize("first", ["compute", "side"])


def downloaded(streams: TwoStreams, num_steps: int, unread: int, at_once: bool = False) -> list[list[int]]:
    """Results of steps, as the host reads them, ``unread`` of them later. Each step counts in the
    same tensor. ``at_once``: rooms are used again before they are read.
    """
    download, total = Download(64, CPU, CudaSideStream(CARD)), torch.zeros(2, dtype=torch.int64)
    found: list[list[int]] = []
    waiting: list[Fetched] = []
    for _ in range(num_steps):
        with streams:
            total.add_(1)
            waiting.append(download.fetch([total, total[:1].int()]))
            total.add_(1)
        if at_once:
            waiting[-1].drop()
        if len(waiting) == unread:
            found += [[*first.tolist(), *second.tolist()] for first, second in [waiting.pop(0).wait()]]
    return [*found, *([*each[0].tolist(), *each[1].tolist()] for each in [late.wait() for late in waiting])]


@FIRST
@pytest.mark.parametrize("unread", [1, 3, 7])
def test_the_host_reads_what_each_step_left(first: str, unread: int, monkeypatch: pytest.MonkeyPatch) -> None:
    streams = TwoStreams(first)
    streams.double(monkeypatch)
    assert downloaded(streams, 20, unread) == [[number] * 3 for number in range(1, 40, 2)]


@pytest.mark.parametrize("deaf", WAITS)
def test_no_wait_can_be_left_out(deaf: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The side stream waits for the results, and the host for their copy."""
    streams = TwoStreams("side", deaf)
    streams.double(monkeypatch)
    assert downloaded(streams, 20, 3) != [[number] * 3 for number in range(1, 40, 2)]


def test_a_room_that_was_not_read_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = TwoStreams("compute")
    streams.double(monkeypatch)
    assert downloaded(streams, 20, 7, at_once=True) != [[number] * 3 for number in range(1, 40, 2)]


@FIRST
def test_steps_that_are_dropped_leave_their_room_to_others(
    first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = TwoStreams(first)
    streams.double(monkeypatch)
    download, made = Download(8, CPU, CudaSideStream(CARD)), transfers._Room
    monkeypatch.setattr(transfers, "_Room", None)
    for number in range(9):
        with streams:
            fetched = download.fetch([torch.full((1,), number)])
        if number % 3:
            fetched.drop()
        else:
            assert fetched.wait()[0].tolist() == [number]
    monkeypatch.setattr(transfers, "_Room", made)
    with streams:
        fetched = download.fetch([torch.arange(5)])
    assert fetched.wait()[0].tolist() == [0, 1, 2, 3, 4], "more than a room holds"


def test_the_next_steps_kernels_do_not_wait_for_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = TwoStreams("compute")
    streams.double(monkeypatch)
    download = Download(64, CPU, CudaSideStream(CARD))
    with streams:
        fetched = [download.fetch([torch.ones(2)]) for _ in range(3)]
    while streams.compute.work:
        assert streams.advance()
    assert len(streams.side.work) == 3 * 3, "no copy has begun"
    assert [each.wait()[0].tolist() for each in fetched] == [[1.0, 1.0]] * 3


def double(streams: TwoStreams, monkeypatch: pytest.MonkeyPatch) -> None:
    """Executors take ``streams`` for those of a card."""
    streams.double(monkeypatch)
    mark = transfers.mark
    for module in (transfers, device_executor):
        monkeypatch.setattr(module, "mark", lambda _: mark(CARD))
    monkeypatch.setattr(device_executor, "side_stream", lambda _: CudaSideStream(CARD))


def assert_same(found: list[StepResult], wanted: list[StepResult]) -> None:
    assert [msgspec.structs.replace(each, **TIMES) for each in found] == [
        msgspec.structs.replace(each, **TIMES) for each in wanted
    ]


@FIRST
@pytest.mark.parametrize("depth", [1, 3, 6])
def test_results_are_those_of_the_other_executor(
    first: str, depth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Expert counts, which are zeroed after a step, among them. A step's seconds are those between
    two events that have passed.
    """
    path = write_checkpoint(tmp_path / "model", qwen3_moe_config(num_hidden_layers=2))
    requests = mixed_requests(SAMPLINGS)[:6]
    plans, wanted = executed(Driver(build_executor(path, column="reference"), requests))
    streams = TwoStreams(first)
    ops = LateOps(streams)
    monkeypatch.setattr(registry, "ops_of", lambda column: ops)
    double(streams, monkeypatch)
    executor = build_executor(path, column="reference", as_device=True)
    assert isinstance(executor, DeviceExecutor)
    monkeypatch.setattr(executor, "submit", streams.within(executor.submit))
    found = results_of(executor, requests, plans, depth)
    assert_same(found, wanted)
    assert {each.seconds for each in found} == {0.004}


@pytest.mark.skipif(torch.cuda.is_available(), reason="steps a model on the CPU, through the interpreter")
@FIRST
def test_a_captured_step_is_repeated_while_results_of_the_one_before_leave(
    first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_checkpoint(tmp_path / "model", qwen3_moe_config(num_hidden_layers=1))
    requests = [Request([2, 9], 5, GREEDY), Request([4, 7], 5, SAMPLINGS[1])]
    driver = Driver(build_executor(path, num_slots=4), requests, lambda step: 4, num_slots=4)
    plans, wanted = executed(driver)
    streams = TwoStreams(first)
    double(streams, monkeypatch)
    recorder = QueuedRecorder(streams, LaunchRecorder())
    executor = build_executor(path, column="triton", as_device=True, recorder=recorder, num_slots=4)
    assert isinstance(executor, DeviceExecutor)
    monkeypatch.setattr(executor, "_compute", None)
    monkeypatch.setattr(executor._captured, "_sizes", (4,))
    monkeypatch.setattr(executor, "submit", streams.within(executor.submit))
    found = results_of(executor, requests, plans, 3)
    assert [mine.tokens_i32 for mine in found] == [theirs.tokens_i32 for theirs in wanted]
    assert [mine.expert_i64 for mine in found] == [theirs.expert_i64 for theirs in wanted]
