"""Waits of a step, timed by the device: a captured step has those of its own repetition, however
many steps are under way, and a lost peer leaves none to the next epoch.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lockstep.engine.models import registry
from lockstep.engine.protocol.plan import Header, Mode, Section, StepPlan
from lockstep.engine.protocol.results import StepResult
from lockstep.engine.rank.contract import StepAbandoned
from lockstep.engine.rank.device import executor as device_executor, transfers
from lockstep.engine.rank.device.executor import DeviceExecutor
from lockstep.engine.rank.device.graphs import GraphRecorder
from lockstep.engine.rank.device.transfers import CudaSideStream
from lockstep.kernels.reference import clock as reference_clock
from lockstep.parallel.collectives import Collectives, Pending
from support.engine.models.checkpoints import qwen3_moe_config, write_checkpoint
from support.engine.rank.hand_plans import GREEDY, Driver, Request, build_executor
from support.engine.rank.late_device import LateOps
from support.engine.rank.launch_recorder import LaunchRecorder
from support.engine.rank.recorded_plans import executed, results_of
from support.engine.rank.two_streams import QueuedRecorder, TwoStreams

CARD, CPU = torch.device("cuda"), torch.device("cpu")
SIZE = 4

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="scripts the clock of the interpreter")


class Clock:
    """The n-th wait since the program began takes n ms, and 1 s passes before each."""

    def __init__(self) -> None:
        self._readings, self._now = 0, 7

    @property
    def next_wait(self) -> int:
        return self._readings // 2 + 1

    def read(self) -> int:
        self._now += 1_000_000 * self.next_wait if self._readings % 2 else 1_000_000_000
        self._readings += 1
        return self._now


def waits_of(executor: DeviceExecutor) -> Callable[[], None]:
    """Waits for experts, then for another stage, as on a card."""
    experts, _, stages = executor._parts.groups._groups
    executor._parts.groups.time_waits(executor._waits)
    work: Any = SimpleNamespace(wait=lambda: True)

    def wait() -> None:
        for group in (experts, stages):
            assert isinstance(group, Collectives)
            group.wait(Pending("tokens", torch.ones(2), work))

    return wait


class Steps:
    """An executor of the model at ``path`` on a device of two streams, captured or not. Each step
    waits for experts and for another stage.
    """

    def __init__(self, path: Path, captured: bool, first: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock, streams = Clock(), TwoStreams(first)
        monkeypatch.setattr(reference_clock, "host_time", self.clock.read)
        if not captured:
            ops = LateOps(streams)
            monkeypatch.setattr(registry, "ops_of", lambda column: ops)
        streams.double(monkeypatch)
        mark = transfers.mark
        for module in (transfers, device_executor):
            monkeypatch.setattr(module, "mark", lambda _: mark(CARD))
        monkeypatch.setattr(device_executor, "side_stream", lambda _: CudaSideStream(CARD))
        recorder: GraphRecorder | None = QueuedRecorder(streams, LaunchRecorder()) if captured else None
        executor = build_executor(
            path,
            Collectives("experts", 0, 1, None, 1.0, CPU),
            column="triton" if captured else "reference",
            as_device=True,
            recorder=recorder,
            num_slots=SIZE,
        )
        assert isinstance(executor, DeviceExecutor)
        if captured:
            monkeypatch.setattr(executor, "_compute", None)
            monkeypatch.setattr(executor._captured, "_sizes", (SIZE,))
        self.executor, self.streams = executor, streams
        computing = (executor._captured, "_layers") if captured else (executor, "_compute")
        compute, wait = getattr(*computing), waits_of(executor)

        def waiting(*args: Any) -> Any:
            wait()
            return compute(*args)

        monkeypatch.setattr(*computing, waiting)
        monkeypatch.setattr(executor, "submit", streams.within(executor.submit))
        clear = executor._waits.clear

        def clear_in_order() -> None:
            while streams.advance():
                """What the device has been given comes first, as it does on a card."""
            clear()
            self.next_wait = self.clock.next_wait

        monkeypatch.setattr(executor._waits, "clear", clear_in_order)

    def idle_step(self, epoch: int) -> StepResult:
        self.executor.submit(StepPlan(Header(0, epoch, 0, -1, Mode.DECODE, SIZE), Section(rebase=True)))
        while (result := self.executor.take()) is None:
            assert self.streams.advance()
        return result


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("waits") / "model", qwen3_moe_config(num_hidden_layers=1))


def milliseconds(results: list[StepResult]) -> list[tuple[float, float]]:
    return [(round(each.waited * 1e3, 6), round(each.stalled * 1e3, 6)) for each in results]


@pytest.mark.parametrize("first", ["compute", "side"])
@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("captured", [False, True])
def test_each_step_has_its_own_waits(
    captured: bool, depth: int, first: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two waits each: n ms for experts and n + 1 for another stage. Those of the warm-up and of the
    capture are no step's.
    """
    requests = [Request([2, 9], 3, GREEDY), Request([4, 7], 4, GREEDY)]
    plans, _ = executed(
        Driver(build_executor(path, num_slots=SIZE), requests, lambda step: SIZE, num_slots=SIZE)
    )
    steps = Steps(path, captured, first, monkeypatch)
    found = results_of(steps.executor, requests, plans, depth)
    assert steps.next_wait == (8 if captured else 2), "captures wait thrice, and the clock is tried once"
    firsts = range(steps.next_wait, steps.next_wait + 2 * len(plans), 2)
    assert milliseconds(found) == [(2 * each + 1, each + 1) for each in firsts]


@pytest.mark.parametrize("captured", [False, True])
def test_a_wait_that_never_ended_leaves_nothing_to_the_next_epoch(
    captured: bool, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device came to a wait for a peer that was gone, with a step under way."""
    half = 1 << 60  # nanoseconds
    steps = Steps(path, captured, "compute", monkeypatch)
    executor = steps.executor
    executor.begin_epoch(2, ())
    before = steps.next_wait
    assert milliseconds([steps.idle_step(2)]) == [(2 * before + 1, before + 1)]
    executor.submit(StepPlan(Header(0, 2, 1, 0, Mode.DECODE, SIZE), Section()))
    with steps.streams:
        executor._waits.totals_R.sub_(half)
    executor.cut(2)
    with pytest.raises(StepAbandoned, match="epoch 2 was cut off"):
        while executor.take() is None:
            assert steps.streams.advance()
    executor.begin_epoch(3, ())
    assert executor._waits.totals_R.tolist() == [0, 0]
    assert milliseconds([steps.idle_step(3)]) == [(2 * steps.next_wait + 1, steps.next_wait + 1)]
