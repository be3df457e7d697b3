"""Transfers between host and device, each of many arrays in one copy.

To the device: arrays of the same lengths lie at the same addresses in every step, as a captured
step needs. To the host: results are put aside on the device, and leave on a stream of their own, so
that the next step's kernels do not wait for the copy. Nothing here waits for the device but a ring
that is full.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
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


class SideStream(Protocol):
    """A stream of copies, beside the one that computes."""

    def copy(self, target: Tensor, source: Tensor) -> Mark:
        """Copies, once the computing stream has come past the work that it has been given. Returns
        the end of the copy.
        """
        ...


class HostCopies:
    """Copies of a host, which are done when they are handed over."""

    def copy(self, target: Tensor, source: Tensor) -> Mark:
        target.copy_(source)
        return Passed()


class CudaSideStream:
    """A ``SideStream`` of a GPU. The computing stream is the current one."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def copy(self, target: Tensor, source: Tensor) -> Mark:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            return mark(self._device)


def side_stream(device: torch.device) -> SideStream:
    """The stream on which results leave ``device``."""
    return CudaSideStream(device) if device.type == "cuda" else HostCopies()


class _Room:
    """Memory for the results of a step: ``aside`` on the device, ``arrived`` on the host."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.aside = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self.arrived = _pinned(num_bytes, device)


class Download:
    """Copies results to the host. There is room for those of ``_DEPTH`` steps of ``num_bytes``;
    more steps, or larger ones, make more room, which is kept. A room is used again once the host
    has read it, so its copy has ended: nothing on the device has to wait for that.
    """

    def __init__(self, num_bytes: int, device: torch.device, side: SideStream) -> None:
        self._device, self._side = device, side
        self._free = deque(_Room(num_bytes, device) for _ in range(_DEPTH))

    def fetch(self, tensors: Sequence[Tensor]) -> Fetched:
        """Begins to copy tensors to the host. Work that the device is given afterwards may
        overwrite them.
        """
        starts, num_bytes = _layout([each.nbytes for each in tensors])
        room = self._room(num_bytes)
        for start, each in zip(starts, tensors, strict=True):
            _view(room.aside, start, each).copy_(each)
        sent = self._side.copy(room.arrived[:num_bytes], room.aside[:num_bytes])
        arrays = [_view(room.arrived, start, each) for start, each in zip(starts, tensors, strict=True)]
        return Fetched(arrays, sent, lambda: self._free.append(room))

    def _room(self, num_bytes: int) -> _Room:
        room = self._free.popleft() if self._free else None
        if room is None or len(room.arrived) < num_bytes:
            room = _Room(num_bytes, self._device)
        return room


class Fetched:
    """Arrays on their way to the host. ``give_back``: called when nobody reads them any more."""

    def __init__(
        self, arrays: Sequence[Tensor], sent: Mark, give_back: Callable[[], None] = lambda: None
    ) -> None:
        self._arrays, self._sent, self._give_back = arrays, sent, give_back

    @property
    def arrived(self) -> bool:
        return self._sent.query()

    def wait(self) -> list[NDArray[Any]]:
        """The arrays, once they are here. Called once."""
        self._sent.synchronize()
        found = [array.numpy().copy() for array in self._arrays]
        self._give_back()
        return found

    def drop(self) -> None:
        """Nobody will read them, so what is still on its way may be overwritten. Called instead of
        ``wait``.
        """
        self._give_back()


def _pinned(num_bytes: int, device: torch.device) -> Tensor:
    return torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")


def _view(packed: Tensor, start: int, like: Tensor) -> Tensor:
    """The part of ``packed`` bytes from ``start`` on that holds a tensor ``like`` another."""
    return packed[start : start + like.nbytes].view(like.dtype).view(like.shape)


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
