"""A process of a cluster as ``launch.cluster.entry`` starts it, but a rank steps its model on a
``LateDevice`` by the executor of a GPU, and meets others by a double of NCCL.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from lockstep.engine.protocol.results import StepResult
from lockstep.engine.rank import process
from lockstep.engine.rank.device import executor as device_executor, transfers
from lockstep.engine.rank.device.executor import DeviceExecutor
from lockstep.kernels import table
from lockstep.launch.cluster import entry
from lockstep.parallel import transports
from support.engine.rank.late_device import LateCopies, LateDevice, LateOps
from support.parallel.nccl_double import NcclDouble

_LOG = logging.getLogger(__name__)


class LateExecutor(DeviceExecutor):
    """Gives work to the device as these methods do to a GPU."""

    late: LateDevice

    def begin_epoch(self, epoch: int, vacant: tuple[int, ...]) -> None:
        with self.late:
            super().begin_epoch(epoch, vacant)

    def submit(self, plan: Any) -> None:
        with self.late:
            super().submit(plan)

    def take(self) -> StepResult | None:
        assert not self.late.faults, self.late.faults
        return super().take()


def main() -> None:
    late = LateDevice()
    ops = LateOps(late)
    double = NcclDouble.on(late)

    def make(parts: Any, spec: Any, max_len: int) -> DeviceExecutor:
        LateExecutor.late = late
        facts = spec.max_running, max_len, spec.mesh.num_cohorts, spec.capacity
        return LateExecutor(parts, *facts, None, spec.collective_deadline)

    table._make = lambda column: ops  # type: ignore[assignment]
    process.warm_up = lambda *args: None  # type: ignore[assignment]
    process._executor = make  # type: ignore[assignment]
    transports.transport_of = lambda device: transports.Nccl(torch.device("cpu"), double)  # type: ignore
    for module in (transfers, device_executor):
        module.mark = lambda device: late.mark()  # type: ignore[attr-defined]
    device_executor.side_stream = lambda device: LateCopies(late)
    entry.main()


if __name__ == "__main__":
    main()
