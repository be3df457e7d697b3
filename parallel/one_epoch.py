"""Groups whose memory a process cannot leave and join again: they serve one epoch, so the process
ends with it, and its replacement meets the others. The recovery grade is a restart of the process.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import torch
from torch._C._distributed_c10d import PrefixStore, Store

from .collectives import Listener, first_line, is_own_fault
from .device_waits import DeviceWaits
from .recovery import PROCESS_RESTART, ProcessSpent, Recovery

Started = torch.Event | None
"""The end of an exchange on its stream; None on a device without streams, where it is over."""


class OneEpochGroup:
    """The memory of ``size`` ranks in which they exchange; this rank is ``index``. On GPUs
    exchanges run on a stream of their own, beside computation. ``means``: name of the memory in
    messages.

    A kind of memory fills ``_meet``, ``_stand_in`` and ``_drop``.
    """

    recovery: Recovery = PROCESS_RESTART
    means: str

    def __init__(self, name: str, index: int, size: int, store: Store, device: torch.device) -> None:
        self.index, self.size, self.waited = index, size, 0.0
        self.listener: Listener | None = None  # the device waits, not the host
        self.device_waits: DeviceWaits | None = None
        self._name, self._store, self._device = name, store, device
        self._met, self._rehearses = False, False
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def role(self) -> str:
        return self._name

    @property
    def transport(self) -> str:
        return self.means if self.size > 1 else ""

    def build(self, epoch: int, vacant: Collection[int] = ()) -> None:
        """Meets the other ranks. Raises ProcessSpent the second time, and where they do not come:
        the memory is half made.
        """
        assert not vacant, f"{self._name}: {self.means} needs every rank, {sorted(vacant)} are away"
        if self._met:
            raise ProcessSpent(
                f"{self._name}: epoch {epoch} needs new {self.means}, which a process gets once"
            )
        assert not self._rehearses, f"{self._name}: a rehearsal ends before an epoch"
        self._met = True
        with self._guarded(f"did not meet its {self.size - 1} peers in epoch {epoch}"):
            self._meet(PrefixStore(f"{self._group}/{epoch}", self._store))

    def rehearse(self) -> None:
        """Allocates memory of this rank's own; exchanges bring nothing."""
        assert not self._met, f"{self._name}: a rehearsal comes before an epoch"
        self._rehearses = True
        self._stand_in()

    def destroy(self) -> None:
        """Raises ProcessSpent if there is memory of an epoch: it is the process's until that
        ends.
        """
        if self._rehearses:
            self._rehearses = False
            self._drop()
        if self._met:
            raise ProcessSpent(f"{self._name}: the epoch has ended, and {self.means} serves one only")

    def cut(self) -> None:
        """Raises ProcessSpent if there is memory of an epoch: its kernels wait for a rank that is
        gone, and cannot be ended.
        """
        if self._met:
            raise ProcessSpent(f"{self._name}: a rank is gone, and exchanges of its epoch never end")

    def wait(self, started: Started) -> None:
        """Keeps what follows on the current stream until the exchange has ended."""
        if started is None:
            return
        waits = self.device_waits
        if waits is not None:
            waits.begin(self.role)
        torch.cuda.current_stream(self._device).wait_event(started)
        if waits is not None:
            waits.end(self.role)

    @property
    def _group(self) -> str:
        return f"{self.means} of {self._name}"

    def _start(self, exchange: Callable[[], None]) -> Started:
        """Calls ``exchange`` for its stream, once the current one has come so far."""
        if self._stream is None:
            with self._guarded("started an exchange"):
                exchange()
            return None
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            with self._guarded("started an exchange"):
                exchange()
            ended: torch.Event = self._stream.record_event()
            return ended

    @contextmanager
    def _guarded(self, did: str) -> Iterator[None]:
        """Calls of a library among ranks. Its errors tell of a lost peer, unless they are this
        rank's own fault; the memory is of no more use then.
        """
        try:
            yield
        except RuntimeError as error:
            if self._rehearses or isinstance(error, ProcessSpent) or is_own_fault(error):
                raise
            lost = f"{self._name}: rank {self.index} {did}: {first_line(error)}"
            raise ProcessSpent(f"{lost}; {self.means} serves one epoch only") from error

    def _meet(self, met: Store) -> None:
        """Allocates memory with the other ranks, who meet at ``met``."""
        raise NotImplementedError

    def _stand_in(self) -> None:
        """Allocates as much without them."""
        raise NotImplementedError

    def _drop(self) -> None:
        """Frees the memory of a rehearsal."""
        raise NotImplementedError
