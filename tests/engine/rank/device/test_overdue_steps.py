"""A step that its peer never ends: the thread beside the loop cuts it off, though the loop waits
for the device and the controller is silent. A step that is merely slow to be taken is left alone.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._C._distributed_c10d import PrefixStore
from torch.distributed import HashStore

from lockstep.engine.protocol.message import Sampling
from lockstep.engine.protocol.plan import Header, Mode, Section, StepPlan
from lockstep.engine.rank import pulse
from lockstep.engine.rank.contract import StepAbandoned
from lockstep.engine.rank.device import transfers
from lockstep.engine.rank.device.executor import DeviceExecutor
from lockstep.engine.rank.pulse import Pulse
from lockstep.parallel.collectives import Collectives
from lockstep.parallel.transports import Nccl
from support.engine.models.checkpoints import qwen3_moe_config, write_checkpoint
from support.engine.rank.hand_plans import GREEDY, Driver, Request, build_executor
from support.engine.rank.late_device import LateDevice, LateMark
from support.engine.rank.mock_controller import MockController
from support.engine.rank.recorded_plans import executed
from support.parallel.late_ranks import late_ranks
from support.parallel.nccl_double import NcclDouble

CPU = torch.device("cpu")
SECONDS = 0.5
GLOO_SECONDS = 6.0  # the double's device hangs on after that; its gloo ends no wait earlier
EMPTY = StepPlan(Header(0, 0, 7, -1, Mode.DECODE, 4), Section(rebase=True))
STRICT = Sampling(temperature=0.0, bad_words_i32=array("i", [5, -1]).tobytes())


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("late") / "model", qwen3_moe_config(num_hidden_layers=2))


@pytest.fixture
def controller(monkeypatch: pytest.MonkeyPatch) -> Iterator[MockController]:
    monkeypatch.setattr(pulse, "BEAT_SECONDS", 0.05)
    controller = MockController()
    yield controller
    controller.close()


class Held:
    """A loop that is in a step."""

    progress = 0, 0, 3


@pytest.mark.parametrize(("sampling", "most"), [(STRICT, 2), (GREEDY, 6)], ids=["tokens", "room"])
def test_a_host_that_waits_for_its_device_gives_up_at_the_deadline(
    sampling: Sampling,
    most: int,
    path: Path,
    controller: MockController,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """``most`` steps can be begun: the last of them waits for those before. The peer meets, and is
    not heard of again.
    """
    request = Request([7, 2, 9, 4], 8, sampling)
    plans, _ = executed(Driver(build_executor(path, column="reference"), [request]))
    waited: list[str] = []
    monkeypatch.setattr(LateMark, "synchronize", noted(LateMark.synchronize, waited))
    store = HashStore()
    with late_ranks() as late:
        experts = Collectives("experts", 0, 2, store, GLOO_SECONDS, CPU)
        executor = build_executor(path, experts, "all_gather", column="reference", as_device=True)
        assert isinstance(executor, DeviceExecutor)
        executor._deadline = SECONDS
        peer: list[Any] = []
        meeting = threading.Thread(target=lambda: peer.append(met(store)), daemon=True)
        meeting.start()
        executor.stage(0, torch.tensor(request.prompt, dtype=torch.int32).numpy().tobytes())
        executor.begin_epoch(0, ())
        meeting.join(60)
        assert peer, "the peer did not meet"
        with Pulse(controller.spec(), Held(), pytest.fail, pytest.fail, executor.cut_overdue):
            submit, begun = late.within(executor.submit), 0
            with pytest.raises(StepAbandoned, match=r"epoch 0 was cut off: step 0 has not ended after 0.5 s"):
                for plan in plans:
                    begun += 1
                    submit(plan)
        assert begun == most and waited == ["waited"], "the host was in a wait when the step was cut off"


def met(store: HashStore) -> Any:
    """The peer's end of the epoch."""
    nccl = Nccl(CPU, NcclDouble.on(LateDevice()))
    return nccl.meet(PrefixStore("experts/0", store), 1, 2, timedelta(seconds=GLOO_SECONDS))


def noted(synchronize: Any, waited: list[str]) -> Any:
    def run(mark: LateMark) -> None:
        if not mark.query():
            waited.append("waited")
        synchronize(mark)

    return run


def test_a_step_that_has_ended_is_not_cut_off_however_long_the_host_takes(path: Path) -> None:
    """It may compile something meanwhile."""
    executor = build_executor(path, column="reference", as_device=True)
    assert isinstance(executor, DeviceExecutor)
    executor._deadline = 0.0
    executor.cut_overdue()
    executor.begin_epoch(0, ())
    executor.submit(EMPTY)
    executor.cut_overdue()
    assert not executor._parts.groups.cut_off
    assert executor.take() is not None


class Failed:
    """A mark of a device that has failed."""

    def query(self) -> bool:
        raise torch.AcceleratorError("an illegal memory access")


class Never:
    """A mark that the device does not come past."""

    def query(self) -> bool:
        return False


@pytest.mark.parametrize(("mark", "reason"), [(Never, "epoch 0 was cut off: step 7 has not"), (Failed, "")])
def test_only_a_step_that_its_device_has_not_ended_is_cut_off(
    mark: type, reason: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = build_executor(path, column="reference", as_device=True)
    assert isinstance(executor, DeviceExecutor)
    executor.begin_epoch(0, ())
    monkeypatch.setattr(transfers, "mark", lambda device: mark())
    monkeypatch.setattr(transfers.HostCopies, "copy", lambda *_: mark())
    executor.submit(EMPTY)
    executor.cut_overdue()
    assert not executor._parts.groups.cut_off, "it has its time"
    executor._deadline = 0.0
    executor.cut_overdue()
    assert executor._parts.groups.cut_off.startswith(reason)
    assert bool(executor._parts.groups.cut_off) == bool(reason)
    executor.begin_epoch(1, ())
    executor.cut_overdue()
    assert not executor._parts.groups.cut_off, "another epoch has no steps yet"
