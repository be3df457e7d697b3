"""A rank as on a GPU: its ops are given to a device that is late, and its messages to a double of
NCCL on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch

from lockstep.engine.models import registry
from lockstep.engine.rank.device import executor as device_executor, transfers
from lockstep.parallel import transports

from ..engine.rank.late_device import LateCopies, LateDevice, LateOps
from .nccl_double import NcclDouble


@contextmanager
def late_ranks() -> Iterator[LateDevice]:
    """Models and groups that are built meanwhile are on the device."""
    late = LateDevice()
    ops, nccl = LateOps(late), transports.Nccl(torch.device("cpu"), NcclDouble.on(late))
    with ExitStack() as stack:
        for module, name, value in (
            (registry, "ops_of", lambda column: ops),
            (transports, "transport_of", lambda device: nccl),
            (transfers, "mark", lambda device: late.mark()),
            (device_executor, "mark", lambda device: late.mark()),
            (device_executor, "side_stream", lambda device: LateCopies(late)),
        ):
            stack.enter_context(mock.patch.object(module, name, value))
        yield late
