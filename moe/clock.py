"""Clocks for the phases of an MoE layer on this rank.

On a GPU the times are the device's. Events take them in one step of many, and they are read only
after the events have passed, so nothing waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

from .phases import PHASES


class PhaseClock(Protocol):
    """Seconds by phase. ``mark`` starts a lap; ``lap`` ends it, as time of a phase, and starts the
    next. ``entered`` counts both: it moves while the host does.
    """

    @property
    def entered(self) -> int: ...

    def begin_step(self) -> None: ...

    def mark(self) -> None: ...

    def lap(self, phase: int) -> None: ...

    def take(self) -> list[float]:
        """Seconds of each of PHASES since the last call, as far as they are known."""
        ...


class HostClock:
    """Measures on the host, for work that the host does itself."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.entered = 0
        self._now = now
        self._last = 0.0
        self._seconds = [0.0] * len(PHASES)

    def begin_step(self) -> None:
        """Every step is measured."""

    def mark(self) -> None:
        self.entered += 1
        self._last = self._now()

    def lap(self, phase: int) -> None:
        self.entered += 1
        now = self._now()
        self._seconds[phase] += now - self._last
        self._last = now

    def take(self) -> list[float]:
        taken, self._seconds = self._seconds, [0.0] * len(PHASES)
        return taken


class DeviceClock:
    """Measures a stream in the step after each ``take``, scaled to the steps until the next one.

    ``begin_step`` counts steps. Events that have not passed at ``take`` wait for the next one.
    """

    def __init__(self, new_event: Any = lambda: torch.cuda.Event(enable_timing=True)) -> None:
        self.entered = 0
        self._new_event = new_event
        self._steps = 0
        self._last: Any = None
        self._laps: list[tuple[int, Any, Any]] = []

    def begin_step(self) -> None:
        self._steps += 1

    def mark(self) -> None:
        self.entered += 1
        if self._steps <= 1:
            self._last = self._new_event()
            self._last.record()

    def lap(self, phase: int) -> None:
        self.entered += 1
        if self._steps <= 1 and self._last is not None:
            before = self._last
            self.mark()
            self._laps.append((phase, before, self._last))

    def take(self) -> list[float]:
        seconds = [0.0] * len(PHASES)
        if all(end.query() for _, _, end in self._laps):
            for phase, start, end in self._laps:
                seconds[phase] += start.elapsed_time(end) * 1e-3 * max(1, self._steps)
            self._laps.clear()
        self._steps, self._last = 0, None
        return seconds


class NoClock:
    """Measures nothing, while launches are recorded: a recording has no times of its own."""

    entered = 0

    def begin_step(self) -> None:
        """No step."""

    def mark(self) -> None:
        """No lap begins."""

    def lap(self, phase: int) -> None:
        """No lap ends."""

    def take(self) -> list[float]:
        return [0.0] * len(PHASES)


def clock_for(device: torch.device) -> PhaseClock:
    """The clock of a device."""
    return DeviceClock() if device.type == "cuda" else HostClock()
