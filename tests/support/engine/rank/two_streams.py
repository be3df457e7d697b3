"""Two streams in place of those of a GPU: each does its work in order, and neither waits for the
other unless it was told to. Work is done when the host waits or asks, a piece at a time, by the
stream ``first`` for as long as it can.

``double`` replaces streams and events of ``torch.cuda``; tensors lie in the host's memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from lockstep.engine.rank.device.graphs import GraphRecorder

from .late_device import LateDevice

WAITS = "wait_stream", "synchronize"
_Work = Callable[[], None]


class TwoStreams(LateDevice):
    """``deaf``: a wait that does nothing, out of ``WAITS``."""

    def __init__(self, first: str, deaf: str = "") -> None:
        torch.utils._python_dispatch.TorchDispatchMode.__init__(self)
        self.faults, self.deaf = [], deaf
        self.compute, self.side = StreamDouble(self), StreamDouble(self)
        self.current = self.compute
        both = [self.compute, self.side]
        self._order = both if first == "compute" else both[::-1]

    def give(self, work: _Work) -> None:
        self.current.work.append((None, work))

    def advance(self) -> bool:
        """Does a piece of work. Returns whether any could be done."""
        for stream in self._order:
            if stream.work and (stream.work[0][0] is None or stream.work[0][0].passed):
                _, work = stream.work.popleft()
                with _disable_current_modes(), torch.inference_mode():
                    work()
                return True
        return False

    @contextmanager
    def on(self, stream: StreamDouble) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def double(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self.side)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self.on)
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: EventDouble(self))


class StreamDouble:
    """``work``, each piece with the event that it waits for, if any."""

    def __init__(self, device: TwoStreams) -> None:
        self._device = device
        self.work: deque[tuple[EventDouble | None, _Work]] = deque()

    def wait_stream(self, other: StreamDouble) -> None:
        if self._device.deaf == "wait_stream":
            return
        event = EventDouble(self._device)
        with self._device.on(other):
            event.record()
        self.work.append((event, lambda: None))


class EventDouble:
    def __init__(self, device: TwoStreams) -> None:
        self._device = device
        self.passed, self.stream = False, device.current

    def record(self) -> None:
        self.stream = self._device.current
        self.stream.work.append((None, self._come))

    def _come(self) -> None:
        self.passed = True

    def query(self) -> bool:
        self._device.advance()
        return self.passed

    def synchronize(self) -> None:
        while not self.passed and self._device.deaf != "synchronize":
            assert self._device.advance(), "both streams wait, or have nothing to do"

    def elapsed_time(self, end: EventDouble) -> float:
        assert self.passed and end.passed, "the time of what has not happened"
        return 4.0


class QueuedRecorder:
    """A ``GraphRecorder`` of ``device``: a repetition is work of its current stream."""

    def __init__(self, device: TwoStreams, recorder: GraphRecorder) -> None:
        self._device, self._recorder = device, recorder

    def record(self, part: Callable[[], Tensor]) -> tuple[_Work, Tensor]:
        repeat, result = self._recorder.record(part)
        return lambda: self._device.give(repeat), result
