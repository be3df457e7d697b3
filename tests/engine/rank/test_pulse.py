"""The pulse of a rank over real CURVE sockets, beside a step that a test holds up."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

import pytest

from lockstep.engine.protocol.bulk import Disband, StepProgress
from lockstep.engine.protocol.message import Stop, encode
from lockstep.engine.rank import pulse
from lockstep.engine.rank.pulse import Pulse
from support.engine.rank.mock_controller import MockController


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


def test_a_step_that_takes_long_tells_how_far_it_is(controller: MockController) -> None:
    held, left = Held(), threading.Event()
    with Pulse(controller.spec(), held, left.set, cut=no_cut):
        assert controller.silent("bulk"), "there is nothing to tell between steps"
        held.progress = 2, 7, 30
        assert controller.receive("bulk") == StepProgress(0, 2, 7, 30)
        held.progress = 2, 7, 31
        while controller.receive("bulk") == StepProgress(0, 2, 7, 30):
            pass
    assert not left.is_set()


def test_a_stop_ends_a_step_that_does_not_end(controller: MockController) -> None:
    held, left = Held(), threading.Event()
    held.progress = 2, 7, 30
    with Pulse(controller.spec(), held, left.set, cut=no_cut):
        controller.receive("bulk")
        stop(controller)
        assert left.wait(30)


def test_a_loop_that_ends_by_itself_is_left_alone(
    controller: MockController, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulse, "LEAVE_SECONDS", 30.0)
    held, left = Held(), threading.Event()
    held.progress = 2, 7, 30
    with Pulse(controller.spec(), held, left.set, cut=no_cut):
        controller.receive("bulk")
        stop(controller)
    assert not left.is_set()


def test_an_epoch_that_is_over_is_cut_off(
    controller: MockController, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step may wait for a device; then the rank goes on, and is told again."""
    monkeypatch.setattr(pulse, "CUT_SECONDS", 0.01)
    held, left, cut = Held(), threading.Event(), queue.SimpleQueue[int]()
    held.progress = 2, 7, 30
    with Pulse(controller.spec(), held, left.set, cut=cut.put):
        controller.receive("bulk")
        for epoch in (2, 3):
            controller.sockets["bulk"].send_multipart([b"p0", encode(Disband(epoch))])
            assert cut.get(timeout=30) == epoch
        assert not left.is_set()
