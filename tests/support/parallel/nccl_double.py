"""``ProcessGroupNCCL`` over gloo: it connects when first used, its waits order the work of a device
and do not block the host, and where a peer is gone nothing happens until somebody aborts.
"""

from __future__ import annotations

import threading
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import ProcessGroupGloo, Store

from ..engine.rank.late_device import LateDevice, LateMark

_NEVER = timedelta(days=1)


class LateWork:
    """A collective that the device will come to."""

    def __init__(self, mark: LateMark) -> None:
        self._mark = mark

    def wait(self) -> bool:
        """Orders the device's work, which is in order anyway."""
        return True

    def is_completed(self) -> bool:
        return self._mark.query()


class NcclDouble:
    """``on`` makes the class for a device."""

    device: LateDevice

    class Options:
        """``_timeout``: of meetings too, which a variable of the environment sets for NCCL."""

        def __init__(self) -> None:
            self._timeout = _NEVER
            self.config = SimpleNamespace(blocking=1)

    @classmethod
    def on(cls, device: LateDevice) -> type[NcclDouble]:
        return type("NcclDoubleOnDevice", (cls,), {"device": device})

    def __init__(self, store: Store, index: int, size: int, options: Options) -> None:
        assert options.config.blocking == 0, "a meeting that nobody joins would not end"
        self._met = store, index, size
        self._options = options
        self._gloo: Any = None
        self._aborted = threading.Event()

    def eager_connect_single_device(self, device: torch.device) -> None:
        """Begins to connect; the first collective waits for the end."""

    def abort(self) -> None:
        self._aborted.set()
        if self._gloo is not None:
            self._gloo.abort()

    def _start(self, outputs: list[Tensor], name: str, *args: Any) -> LateWork:
        if self._aborted.is_set():
            raise RuntimeError("the communicator was aborted")
        if self._gloo is None:
            store, index, size = self._met
            self._gloo = ProcessGroupGloo(store, index, size, self._options._timeout)
        self.device.give(lambda: self._exchange(outputs, name, args))
        return LateWork(self.device.mark())

    def _exchange(self, outputs: list[Tensor], name: str, args: tuple[Any, ...]) -> None:
        try:
            work = getattr(self._gloo, name)(*args)
            work.wait(_NEVER)
        except RuntimeError:
            assert self._aborted.wait(300), "a peer is gone, and nobody aborts within 300 s"
            # Memory that nobody wrote may hold anything: here floats of 0.7, and integers out of
            # any range. Not NaN: it gets into pages, and the reference's attention multiplies what
            # lies beyond a row's length by 0. Kernels that serve do not read it.
            for output in outputs:
                output.untyped_storage().fill_(0x3F)

    def alltoall_base(self, output: Tensor, rows: Tensor, received: list[int], sent: list[int]) -> LateWork:
        return self._start([output], "alltoall_base", output, rows, received, sent)

    def _allgather_base(self, output: Tensor, rows: Tensor) -> LateWork:
        return self._start([output], "_allgather_base", output, rows)

    def _reduce_scatter_base(self, output: Tensor, rows: Tensor) -> LateWork:
        return self._start([output], "_reduce_scatter_base", output, rows)

    def allreduce(self, tensors: list[Tensor]) -> LateWork:
        return self._start(tensors, "allreduce", tensors)

    def broadcast(self, tensors: list[Tensor], options: Any) -> LateWork:
        return self._start(tensors, "broadcast", tensors, options)

    def send(self, tensors: list[Tensor], to: int, tag: int) -> LateWork:
        return self._start([], "send", tensors, to, tag)

    def recv(self, tensors: list[Tensor], source: int, tag: int) -> LateWork:
        return self._start(tensors, "recv", tensors, source, tag)
