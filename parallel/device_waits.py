"""Waits of the stream that computes on a device, for the streams that exchange.

The host does not wait there, so the device times them: it reads its own clock before and after each
wait. A captured step repeats that with all else. Each wait takes two launches of a single thread,
in captured steps too; their cost on a card is not measured. A wait that finds its exchange over
counts as the time of a launch.

Suffix: R roles of groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from numpy.typing import NDArray

AddTime = Callable[[torch.Tensor, int, int], None]
"""Adds the device's clock in nanoseconds, times a sign, to a place of int64 totals, when the device
comes to it (``add_time`` of the op table)."""


class DeviceWaits:
    """Adds up waits by the ``roles`` of the groups that are waited for. ``totals_R``: int64
    nanoseconds on ``device`` since ``clear``, at one address. Sums wrap, so spans are exact.
    """

    def __init__(self, roles: Iterable[str], device: torch.device, add_time: AddTime) -> None:
        self._places = {role: place for place, role in enumerate(dict.fromkeys(roles))}
        self.totals_R = torch.zeros(len(self._places), dtype=torch.int64, device=device)
        self._before_R = np.zeros(len(self._places), np.int64)
        self._add_time = add_time

    def begin(self, role: str) -> None:
        """A wait begins, for a group of that role."""
        self._add_time(self.totals_R, self._places[role], -1)

    def end(self, role: str) -> None:
        """It ends."""
        self._add_time(self.totals_R, self._places[role], 1)

    def clear(self) -> None:
        """Forgets all waits, and what is left of one that never ended. Times one before, so that
        the op is compiled.
        """
        role = next(iter(self._places))
        self.begin(role)
        self.end(role)
        self.totals_R.zero_()
        self._before_R = np.zeros_like(self._before_R)

    def since(self, totals_R: NDArray[np.int64]) -> dict[str, float]:
        """Seconds by role that were added between the totals of the last call and these."""
        seconds_R = (totals_R - self._before_R) * 1e-9
        self._before_R = totals_R
        return dict(zip(self._places, seconds_R.tolist(), strict=True))
