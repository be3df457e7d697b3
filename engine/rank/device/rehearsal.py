"""The rehearsal of a rank on a GPU: steps of all sizes, computed and captured before the rank meets
the others.

Afterwards every kernel is compiled, and the memory that steps and their recordings take is known,
so that the pages get the rest. Groups meet without peers: results have the shapes that they will
have, and hold nothing of others. So a rank that joins later rehearses as the first ones did, while
those serve. Pages cannot be resized under a recording, which holds their addresses; so the
rehearsal writes to a pool of its own, of one page, and steps are captured once more in an epoch.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import Protocol

import torch

from ..page_pool import free_bytes
from .executor import DeviceExecutor

_LOG = logging.getLogger(__name__)


class DeviceMemory(Protocol):
    """The memory of a device."""

    def free(self) -> int:
        """Bytes that nobody holds, after the work that the device has been given."""
        ...

    def release(self) -> None:
        """Gives back memory that is kept for later tensors."""
        ...


class CudaMemory:
    """The memory of a GPU. Torch keeps what tensors have freed: it is not free."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def free(self) -> int:
        torch.cuda.synchronize(self._device)
        return free_bytes(self._device)

    def release(self) -> None:
        gc.collect()
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()


def rehearse(make: Callable[[], DeviceExecutor], memory: DeviceMemory) -> int:
    """Bytes that steps and their recordings take beside weights and pages: those that go while an
    executor of ``make`` rehearses. Nothing of it is kept.
    """
    memory.release()
    before = memory.free()
    executor = make()
    with executor.rehearsing():
        taken = before - memory.free()
    del executor
    memory.release()
    _LOG.info("steps and their recordings take %.2f GiB", taken / (1 << 30))
    return max(0, taken)
