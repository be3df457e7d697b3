"""The executor of a device that the host does not wait for: results are those of the other
executor, and an epoch that is cut off leaves none.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from lockstep.engine.models import registry
from lockstep.engine.protocol.message import Sampling
from lockstep.engine.protocol.plan import Header, Mode, Section, StepPlan
from lockstep.engine.protocol.results import StepResult
from lockstep.engine.rank.contract import StepAbandoned
from lockstep.engine.rank.device import executor as device_executor, transfers
from lockstep.engine.rank.device.executor import DeviceExecutor
from support.engine.models.checkpoints import deepseek_v3_config, write_checkpoint
from support.engine.rank.hand_plans import GREEDY, Driver, Request, build_executor
from support.engine.rank.late_device import LateCopies, LateDevice, LateMark, LateOps
from support.engine.rank.recorded_plans import executed, mixed_requests, results_of

TIMES = {"waited": 0.0, "seconds": 0.0, "stalled": 0.0, "phases_f32": b""}
ASKS = Sampling(temperature=0.9, seed=7, num_logprobs=3)
HOT = Sampling(temperature=0.9, top_k=40, top_p=0.9, seed=4)
SAMPLINGS = GREEDY, HOT, Sampling(presence_penalty=1.0), ASKS


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Iterator[LateDevice]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)  # both threads hold the lock of the interpreter most of the time
    device = LateDevice()
    ops = LateOps(device)
    monkeypatch.setattr(registry, "ops_of", lambda column: ops)
    for module in (transfers, device_executor):
        monkeypatch.setattr(module, "mark", lambda _: device.mark())
    monkeypatch.setattr(device_executor, "side_stream", lambda _: LateCopies(device))
    yield device
    sys.setswitchinterval(interval)
    assert not device.faults


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("late") / "model", deepseek_v3_config())


def on(late: LateDevice, executor: DeviceExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor, "submit", late.within(executor.submit))


def test_results_are_those_of_the_other_executor(
    path: Path, late: LateDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = mixed_requests(SAMPLINGS)[:6]
    plans, wanted = executed(Driver(build_executor(path, column="reference"), requests))
    executor = build_executor(path, column="reference", as_device=True)
    assert isinstance(executor, DeviceExecutor)
    on(late, executor, monkeypatch)
    found = results_of(executor, requests, plans, 3)
    assert [msgspec.structs.replace(each, **TIMES) for each in found] == [
        msgspec.structs.replace(each, **TIMES) for each in wanted
    ]


def test_steps_with_log_probabilities_are_begun_while_the_device_is_behind(
    path: Path, late: LateDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host waits for no token, and the values are those of an executor that waits for each."""
    requests = [Request([5, 9, 2, 30], 4, ASKS), Request([7, 3], 4, GREEDY), Request([11, 8], 4, ASKS)]
    plans, wanted = executed(Driver(build_executor(path, column="reference"), requests))
    executor = build_executor(path, column="reference", as_device=True)
    assert isinstance(executor, DeviceExecutor)
    on(late, executor, monkeypatch)
    for number, request in enumerate(requests):
        executor.stage(number, np.asarray(request.prompt, np.int32).tobytes())
    executor.begin_epoch(0, ())
    goes_on = LateMark()
    late.give(goes_on.synchronize)
    for plan in plans[:3]:
        executor.submit(plan)
    assert len(executor._under_way) == 3 and executor.take() is None, "no step has ended"
    goes_on.come()
    found = taken(executor, 3)
    for plan in plans[3:]:
        executor.submit(plan)
        found += taken(executor, 1)
    assert sum(len(each.logprobs) for each in found) == 2 * 4
    assert [msgspec.structs.replace(each, **TIMES) for each in found] == [
        msgspec.structs.replace(each, **TIMES) for each in wanted
    ]


def taken(executor: DeviceExecutor, number: int) -> list[StepResult]:
    found: list[StepResult] = []
    end = time.monotonic() + 60
    while len(found) < number:
        if (result := executor.take()) is not None:
            found.append(result)
        assert time.monotonic() < end, f"{len(found)} of {number} results within 60 s"
    return found


def test_an_epoch_that_is_cut_off_leaves_no_results(
    path: Path, late: LateDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = build_executor(path, column="reference", as_device=True)
    assert isinstance(executor, DeviceExecutor)
    on(late, executor, monkeypatch)
    executor.begin_epoch(2, ())
    goes_on = LateMark()
    late.give(goes_on.synchronize)  # the device waits for a peer
    executor.submit(StepPlan(Header(0, 2, 7, -1, Mode.DECODE, 4), Section(rebase=True)))
    assert executor.take() is None, "it is under way"
    executor.cut(1)
    goes_on.come()
    executor._under_way[0].fetched.wait()
    executor.cut(2)
    with pytest.raises(StepAbandoned, match="epoch 2 was cut off"):
        executor.take()
    executor.begin_epoch(3, ())
    executor.submit(StepPlan(Header(0, 3, 0, -1, Mode.DECODE, 4), Section(rebase=True)))
    late.mark().synchronize()
    result = executor.take()
    assert result is not None and np.frombuffer(result.tokens_i32, np.int32).tolist() == []
