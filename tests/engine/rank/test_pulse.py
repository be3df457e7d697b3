"""The pulse of a rank over real CURVE sockets, beside a step that a test holds up."""

from __future__ import annotations

import queue
from collections.abc import Iterator

import pytest
import torch
from torch.distributed import HashStore

from lockstep.engine.protocol.bulk import Disband, StepProgress
from lockstep.engine.protocol.message import Stop, encode
from lockstep.engine.rank import pulse
from lockstep.engine.rank.pulse import Pulse
from lockstep.parallel.rank_groups import RankGroups
from lockstep.parallel.recovery import SPENT_STATUS, ProcessSpent
from lockstep.parallel.symmetric_memory import SymmetricGroup
from support.engine.rank.mock_controller import MockController
from support.parallel.symmetric_double import AbsentLibrary


class Held:
    progress: tuple[int, int, int] | None = None


@pytest.fixture
def controller(monkeypatch: pytest.MonkeyPatch) -> Iterator[MockController]:
    monkeypatch.setattr(pulse, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(pulse, "LEAVE_SECONDS", 0.1)
    controller = MockController()
    yield controller
    controller.close()


def stop(controller: MockController) -> None:
    controller.sockets["bulk"].send_multipart([b"p0", encode(Stop())])


def no_cut(epoch: int) -> None:
    raise AssertionError(f"epoch {epoch} is cut off")


def nothing_overdue() -> None:
    """A step has its time."""


def test_a_step_that_takes_long_tells_how_far_it_is(controller: MockController) -> None:
    held, left = Held(), queue.SimpleQueue[int]()
    with Pulse(controller.spec(), held, left.put, no_cut, nothing_overdue):
        assert controller.silent("bulk"), "there is nothing to tell between steps"
        held.progress = 2, 7, 30
        assert controller.receive("bulk") == StepProgress(0, 2, 7, 30)
        held.progress = 2, 7, 31
        while controller.receive("bulk") == StepProgress(0, 2, 7, 30):
            pass
    assert left.empty()


def test_a_stop_ends_a_step_that_does_not_end(controller: MockController) -> None:
    held, left = Held(), queue.SimpleQueue[int]()
    held.progress = 2, 7, 30
    with Pulse(controller.spec(), held, left.put, no_cut, nothing_overdue):
        controller.receive("bulk")
        stop(controller)
        assert left.get(timeout=30) == 0


def test_a_loop_that_ends_by_itself_is_left_alone(
    controller: MockController, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulse, "LEAVE_SECONDS", 30.0)
    held, left = Held(), queue.SimpleQueue[int]()
    held.progress = 2, 7, 30
    with Pulse(controller.spec(), held, left.put, no_cut, nothing_overdue):
        controller.receive("bulk")
        stop(controller)
    assert left.empty()


def test_an_epoch_that_is_over_is_cut_off(
    controller: MockController, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step may wait for a device; then the rank goes on, and is told again."""
    monkeypatch.setattr(pulse, "CUT_SECONDS", 0.01)
    held, left, cut = Held(), queue.SimpleQueue[int](), queue.SimpleQueue[int]()
    held.progress = 2, 7, 30
    with Pulse(controller.spec(), held, left.put, cut.put, nothing_overdue):
        controller.receive("bulk")
        for epoch in (2, 3):
            controller.sockets["bulk"].send_multipart([b"p0", encode(Disband(epoch))])
            assert cut.get(timeout=30) == epoch
        assert left.empty()


def test_where_nothing_cuts_a_device_off_the_process_ends_as_spent(
    controller: MockController, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop waits for kernels that wait for a rank that is gone."""
    monkeypatch.setattr(pulse, "CUT_SECONDS", 0.01)
    group = SymmetricGroup("experts", 0, 1, HashStore(), torch.device("cpu"), AbsentLibrary())
    group.reserve((3,), torch.int64)
    groups = RankGroups(group)
    held, left = Held(), queue.SimpleQueue[int]()
    held.progress = 2, 7, 30
    groups.build(2)
    with Pulse(controller.spec(), held, left.put, groups.cut, nothing_overdue):
        controller.receive("bulk")
        controller.sockets["bulk"].send_multipart([b"p0", encode(Disband(2))])
        assert left.get(timeout=30) == SPENT_STATUS
    groups.close()  # also where the process ends as told


def test_a_step_that_is_overdue_is_cut_off_without_the_controller(
    controller: MockController,
) -> None:
    """At every beat, whatever the loop does; and a process whose device nothing ends is spent."""
    left, asked = queue.SimpleQueue[int](), queue.SimpleQueue[int]()

    def spent() -> None:
        asked.put(1)
        if asked.qsize() > 2:
            raise ProcessSpent("a rank is gone")

    with Pulse(controller.spec(), Held(), left.put, no_cut, spent):
        assert left.get(timeout=30) == SPENT_STATUS
    assert asked.qsize() > 2
