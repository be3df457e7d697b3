"""Captured parts of a step: launches that a device repeats by itself, over tensors at fixed
addresses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

_WARM_UPS = 2  # runs before a capture: they compile kernels, and libraries find their workspaces


class GraphRecorder(Protocol):
    """Records launches, to repeat them. All recordings share a memory pool."""

    def record(self, part: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Runs ``part`` to record what it launches; the result of each repetition is in the tensor
        that it returned.
        """
        ...


class CudaRecorder:
    """Records CUDA graphs."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None

    def record(self, part: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        side = torch.cuda.Stream(self._device)
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                part()
        torch.cuda.current_stream(self._device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = part()
        self._pool = graph.pool()
        return graph.replay, result


class Graphs:
    """Recordings by key. Nothing is recorded without a ``recorder``."""

    def __init__(self, recorder: GraphRecorder | None) -> None:
        self._recorder = recorder
        self._recorded: dict[tuple[str, int], tuple[Callable[[], None], Tensor]] = {}

    @property
    def num_recorded(self) -> int:
        return len(self._recorded)

    def forget(self) -> None:
        """Drops all recordings: the groups that they use are gone."""
        self._recorded.clear()

    def run(self, key: tuple[str, int], part: Callable[[], Tensor]) -> Tensor:
        """Repeats the recording of ``part`` under ``key``; makes it at the first time."""
        if key not in self._recorded:
            assert self._recorder is not None, "nothing to record with"
            self._recorded[key] = self._recorder.record(part)
        repeat, result = self._recorded[key]
        repeat()
        return result

    def result(self, key: tuple[str, int]) -> Tensor:
        """The tensor in which the recording under ``key`` leaves its result."""
        return self._recorded[key][1]
