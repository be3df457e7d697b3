"""The libraries that carry messages between ranks, by device."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Protocol

import torch
from torch._C._distributed_c10d import ProcessGroupGloo, Store

from .recovery import ABORT_AND_RECAPTURE, REGROUP, Recovery


class Transport(Protocol):
    """A way to exchange tensors. ``on_host``: a wait ends when the host can read the result, and
    fails where a peer is gone; otherwise it only orders the work of a device.
    """

    name: str
    recovery: Recovery
    on_host: bool

    def meet(self, store: Store, index: int, size: int, deadline: timedelta) -> Any:
        """A group of its own, not torch's global one, so that two clusters fit in one process.
        Raises RuntimeError.
        """
        ...


class Gloo:
    """CPUs, over TCP. Its waits end by themselves."""

    name = "gloo"
    recovery: Recovery = REGROUP
    on_host = True

    def meet(self, store: Store, index: int, size: int, deadline: timedelta) -> Any:
        return ProcessGroupGloo(store, index, size, deadline)


class Nccl:
    """GPUs. A kernel whose peer is gone never ends, and nobody is told: it is aborted from outside.

    ``group_type``: torch's ``ProcessGroupNCCL`` unless given. Communicators do not block the host
    while they connect (``blocking`` 0), so that a meeting which nobody joins ends by itself, after
    TORCH_NCCL_NONBLOCKING_TIMEOUT.
    """

    name = "NCCL"
    recovery: Recovery = ABORT_AND_RECAPTURE
    on_host = False

    def __init__(self, device: torch.device, group_type: Any = None) -> None:
        self._device, self._group_type = device, group_type

    def meet(self, store: Store, index: int, size: int, deadline: timedelta) -> Any:
        """Connects here: else the first collective would, in the middle of a step."""
        group_type = self._group_type
        if group_type is None:
            from torch._C._distributed_c10d import ProcessGroupNCCL as group_type
        options = group_type.Options()
        options._timeout = deadline
        options.config.blocking = 0
        group = group_type(store, index, size, options)
        group.eager_connect_single_device(self._device)
        group.allreduce([torch.zeros(1, device=self._device)]).wait()  # returns when all are connected
        return group


def transport_of(device: torch.device) -> Transport:
    """The transport between devices of this kind."""
    return Gloo() if device.type == "cpu" else Nccl(device)
