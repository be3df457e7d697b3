"""Waits of the stream that computes on a device, for the streams that exchange.

The host does not wait there, so it cannot time them: marks on the stream do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import torch

MarkT = TypeVar("MarkT")


class DeviceWait(NamedTuple, Generic[MarkT]):
    """The marks before and after a wait, and the role of the group that was waited for."""

    role: str
    began: MarkT
    ended: MarkT


class DeviceWaits(Generic[MarkT]):
    """Notes waits by ``mark``, which marks the end of the work that the stream has been given.
    Nothing is noted while launches are recorded: a recording has no times of its own.
    """

    def __init__(
        self,
        mark: Callable[[], MarkT],
        recording: Callable[[], bool] = torch.cuda.is_current_stream_capturing,
    ) -> None:
        self._mark, self._recording = mark, recording
        self._noted: list[DeviceWait[MarkT]] = []

    def begin(self) -> MarkT | None:
        """A wait begins; None if it is not noted."""
        return None if self._recording() else self._mark()

    def end(self, role: str, began: MarkT | None) -> None:
        """The wait of ``begin`` has ended, for a group of that role."""
        if began is not None:
            self._noted.append(DeviceWait(role, began, self._mark()))

    def take(self) -> list[DeviceWait[MarkT]]:
        """The waits since the last call."""
        taken, self._noted = self._noted, []
        return taken
