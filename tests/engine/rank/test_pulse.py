"""The pulse of a rank over real CURVE sockets, beside a step that a test holds up."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from lockstep.engine.protocol.bulk import StepProgress
from lockstep.engine.protocol.message import Stop
from lockstep.engine.protocol.sockets import encode
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


def test_a_step_that_takes_long_tells_how_far_it_is(controller: MockController) -> None:
    held, left = Held(), threading.Event()
    with Pulse(controller.spec(), held, left.set):
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
    with Pulse(controller.spec(), held, left.set):
        controller.receive("bulk")
        stop(controller)
        assert left.wait(30)


def test_a_loop_that_ends_by_itself_is_left_alone(
    controller: MockController, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulse, "LEAVE_SECONDS", 30.0)
    held, left = Held(), threading.Event()
    held.progress = 2, 7, 30
    with Pulse(controller.spec(), held, left.set):
        controller.receive("bulk")
        stop(controller)
    assert not left.is_set()
