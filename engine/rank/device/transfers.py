"""Transfers between host and device, each of many arrays in one copy.

Arrays of the same lengths lie at the same addresses of the device in every step, as a captured step
needs. Nothing here waits for the device but a ring that is full.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ALIGNMENT = 16  # bytes; any dtype may follow any other
_DEPTH = 4  # steps on their way, and one more


class Mark(Protocol):
    """A place in the work of a device."""

    def query(self) -> bool:
        """Whether the device has come past it."""
        ...

    def synchronize(self) -> None:
        """Waits until it has."""
        ...


class Passed:
    """A mark in the work of a host, which is done when it is handed over."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        """Nothing to wait for."""


def mark(device: torch.device) -> Mark:
    """Marks the end of the work that a device has been given so far."""
    if device.type != "cuda":
        return Passed()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class Upload:
    """Copies arrays to ``num_bytes`` of memory on a device."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self._device = device
        self._target = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self._ring = [_pinned(num_bytes, device) for _ in range(_DEPTH)]
        self._sent: list[Mark] = [Passed()] * _DEPTH
        self._turn = 0

    def send(self, arrays: Sequence[NDArray[Any]]) -> list[Tensor]:
        """The arrays on the device, in their order; the next call overwrites them, after the work
        that the device has been given by then.
        """
        starts, num_bytes = _layout([array.nbytes for array in arrays])
        assert num_bytes <= len(self._target), f"{num_bytes} bytes, room for {len(self._target)}"
        self._turn = (self._turn + 1) % _DEPTH
        self._sent[self._turn].synchronize()
        source = self._ring[self._turn]
        packed = source.numpy()
        for start, array in zip(starts, arrays, strict=True):
            packed[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self._target[:num_bytes].copy_(source[:num_bytes], non_blocking=True)
        self._sent[self._turn] = mark(self._device)
        return [self._view(start, array) for start, array in zip(starts, arrays, strict=True)]

    def _view(self, start: int, array: NDArray[Any]) -> Tensor:
        dtype = torch.from_numpy(np.zeros(0, array.dtype)).dtype
        return self._target[start : start + array.nbytes].view(dtype).view(array.shape)


class Fetched:
    """Arrays on their way to the host."""

    def __init__(self, arrays: Sequence[Tensor], sent: Mark) -> None:
        self._arrays, self._sent = arrays, sent

    @property
    def arrived(self) -> bool:
        return self._sent.query()

    def wait(self) -> list[NDArray[Any]]:
        """The arrays, once they are here."""
        self._sent.synchronize()
        return [array.numpy() for array in self._arrays]


def fetch(tensors: Sequence[Tensor], device: torch.device) -> Fetched:
    """Begins to copy tensors to the host."""
    copies = [torch.empty(each.shape, dtype=each.dtype, pin_memory=device.type == "cuda") for each in tensors]
    for copy, each in zip(copies, tensors, strict=True):
        copy.copy_(each, non_blocking=True)
    return Fetched(copies, mark(device))


def _pinned(num_bytes: int, device: torch.device) -> Tensor:
    return torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")


def _layout(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Starts of arrays of these bytes, and the end of the last one."""
    starts, end = [], 0
    for size in sizes:
        start = -(-end // _ALIGNMENT) * _ALIGNMENT
        starts.append(start)
        end = start + size
    return starts, end


def seconds_between(began: Mark, ended: Mark, handed_over: float) -> float:
    """Seconds of the device between two marks that it has passed; on a host, those that it took to
    hand the work over.
    """
    if isinstance(began, Passed):
        return handed_over
    return float(began.elapsed_time(ended)) * 1e-3  # type: ignore[attr-defined]
