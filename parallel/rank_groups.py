"""The groups that a rank belongs to, which meet anew in every epoch."""

from __future__ import annotations

import threading
from collections.abc import Collection
from contextlib import suppress
from typing import Protocol

from .collectives import CollectiveError, Listener
from .device_waits import DeviceWaits
from .recovery import ProcessSpent, Recovery, gravest


class EpochGroup(Protocol):
    """A group of ranks that meets anew in every epoch."""

    listener: Listener | None
    device_waits: DeviceWaits | None

    @property
    def size(self) -> int: ...

    @property
    def waited(self) -> float: ...

    @property
    def recovery(self) -> Recovery: ...

    @property
    def role(self) -> str: ...

    @property
    def transport(self) -> str: ...

    def build(self, epoch: int, vacant: Collection[int] = ()) -> None: ...

    def rehearse(self) -> None:
        """Lets this rank compute steps by itself, before any epoch, until ``destroy``."""
        ...

    def destroy(self) -> None: ...

    def cut(self) -> None: ...


class RankGroups:
    """The groups that a rank belongs to: built, and dropped, together and in order. Those over
    which ``experts`` are spread can meet without some of their ranks. ``is_cut``: the epoch was cut
    off, and what a device has computed since means nothing.
    """

    def __init__(self, *groups: EpochGroup, experts: Collection[EpochGroup] = ()) -> None:
        self._groups = groups
        self._experts = experts
        self._lock = threading.Lock()
        self._epoch = -1
        self.is_cut = False

    @property
    def recovery(self) -> Recovery:
        """The gravest grade of all groups."""
        return gravest(group.recovery for group in self._groups)

    @property
    def transports(self) -> str:
        """The transport of each group by its role: shared memory for experts; gloo for stages,
        tokens.
        """
        by_transport: dict[str, list[str]] = {}
        for group in self._groups:
            if group.transport:
                by_transport.setdefault(group.transport, []).append(group.role)
        return "; ".join(f"{name} for {', '.join(roles)}" for name, roles in by_transport.items())

    @property
    def alone(self) -> bool:
        """Whether no group has another rank."""
        return all(group.size == 1 for group in self._groups)

    @property
    def waited(self) -> float:
        """Seconds that the host spent in waits, in all groups."""
        return sum(group.waited for group in self._groups)

    def listen(self, listener: Listener | None) -> None:
        """Waits in all groups are told to ``listener`` from now on."""
        for group in self._groups:
            group.listener = listener

    @property
    def roles(self) -> tuple[str, ...]:
        """The role of each group."""
        return tuple(group.role for group in self._groups)

    def time_waits(self, waits: DeviceWaits) -> None:
        """Waits of the device in all groups are added up by ``waits`` from now on."""
        for group in self._groups:
            group.device_waits = waits

    def build(self, epoch: int, vacant: Collection[int] = ()) -> None:
        """Meets the ranks of every group under a prefix of this epoch; ``vacant`` positions of
        those that share experts stay away.
        """
        with self._lock:
            self._epoch, self.is_cut = epoch, False
        for group in self._groups:
            group.build(epoch, vacant if group in self._experts else ())
            self.check()

    def rehearse(self) -> None:
        """As ``EpochGroup.rehearse``, in every group."""
        for group in self._groups:
            group.rehearse()

    def cut(self, epoch: int) -> None:
        """Ends what this rank's device waits for in ``epoch`` or an earlier one. Any thread may
        call: the rank's own may wait for the device. Raises ProcessSpent where that never ends.
        """
        with self._lock:
            if self._epoch <= epoch:
                self.is_cut = True
                for group in self._groups:
                    group.cut()

    def check(self) -> None:
        """Raises CollectiveError if the epoch was cut off."""
        if self.is_cut:
            raise CollectiveError(f"epoch {self._epoch} was cut off")

    def destroy(self) -> None:
        """Drops the process groups. Their collectives under way fail."""
        for group in self._groups:
            group.destroy()

    def close(self) -> None:
        """As ``destroy``, where this process ends."""
        with suppress(ProcessSpent):
            self.destroy()
