"""Memory that ranks of one host share: each writes its own segment and reads those of its peers.

A segment has no name in any folder. Peers open it through the process that made it, and it is gone
with the last process that maps it. It holds a ring of slots for messages, and numbers: of the
message published last, which lies in slot number % RING; whether the rank has left the group; and
for each peer and slot, of the message that was read there last.

A message is written before its number. x86-64 keeps the order of stores; other machines have no
segments. Who waits for a number sleeps on it (futex(2)).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import secrets
import select
import sys
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

RING = 4
"""Messages of a rank that may be unread; two microbatches have two under way."""

REGION = 1 << 18
"""Bytes of the largest message to one peer."""

_LEFT, _READ, _LINE = 64, 128, 64  # offsets in a segment; each writer of numbers has a line of its own
_FUTEX, _FUTEX_WAIT, _FUTEX_WAKE, _ALL = 202, 0, 1, 2**31 - 1
_SLEEPING = ctypes.CDLL(None).syscall  # other threads go on meanwhile
_WAKING = ctypes.PyDLL(None).syscall


class _Seconds(ctypes.Structure):
    _fields_ = (("whole", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class Address(NamedTuple):
    """A segment's place, a descriptor of a process, and a token that its name ends with."""

    pid: int
    descriptor: int
    token: int

    @property
    def name(self) -> str:
        return f"lockstep-{self.token:x}"


class Segment:
    """The memory of one rank in a group of ``size``. ``own``: this rank's, which it may write."""

    def __init__(self, descriptor: int, size: int, own: bool) -> None:
        self.room = size * REGION
        self._first = -(-(_READ + _LINE * size) // mmap.PAGESIZE) * mmap.PAGESIZE
        length = self._first + RING * self.room
        if own:
            os.ftruncate(descriptor, length)
        access = mmap.PROT_READ | mmap.PROT_WRITE if own else mmap.PROT_READ
        memory = mmap.mmap(descriptor, length, mmap.MAP_SHARED, access)
        words = memoryview(memory).cast("Q")
        lines = [_READ + _LINE * peer for peer in range(size)]
        self.published, self.left = words[:1], words[_LEFT // 8 :][:1]
        self.read = [words[line // 8 :][:RING] for line in lines]  # by writer, then slot
        self._base: int = np.frombuffer(memory, np.uint8).ctypes.data
        self._word = ctypes.c_void_p(self._base)

    def slot(self, number: int) -> int:
        """The address of message ``number``: ``room`` bytes."""
        return self._base + self._first + number % RING * self.room

    def publish(self, number: int) -> None:
        """Message ``number`` is complete."""
        self.published[0] = number
        self._wake()

    def leave(self) -> None:
        """This rank publishes no more."""
        self.left[0] = 1
        self._wake()

    def sleep(self, seen: int, seconds: float) -> None:
        """Sleeps while ``published`` is ``seen``, for ``seconds`` < 1 at most. May return early."""
        limit = _Seconds(0, int(1e9 * seconds))
        low = ctypes.c_uint32(seen & 0xFFFFFFFF)
        _SLEEPING(_FUTEX, self._word, _FUTEX_WAIT, low, ctypes.byref(limit), None, 0)

    def _wake(self) -> None:
        _WAKING(_FUTEX, self._word, _FUTEX_WAKE, _ALL, None, None, 0)


def create_segment(size: int) -> tuple[Segment, Address]:
    """This rank's segment; its descriptor is to be closed once all peers have opened it. Raises
    OSError where there are none.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise OSError(f"{platform.machine()} may publish a number before its message")
    address = Address(os.getpid(), -1, secrets.randbits(62))
    descriptor = os.memfd_create(address.name, os.MFD_CLOEXEC)
    return Segment(descriptor, size, own=True), address._replace(descriptor=descriptor)


def open_segment(address: Address, size: int) -> Segment:
    """A peer's segment. Raises OSError where the peer is on another host, or hidden."""
    path = f"/proc/{address.pid}/fd/{address.descriptor}"
    found = os.readlink(path)
    if found != f"/memfd:{address.name} (deleted)":
        raise FileNotFoundError(f"{path} is {found}")
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return Segment(descriptor, size, own=False)
    finally:
        os.close(descriptor)


class Processes:
    """Processes of this host, by number."""

    def __init__(self, pids: Mapping[int, int]) -> None:
        """Raises OSError for one that does not run."""
        self._poll = select.poll()
        self._number_of: dict[int, int] = {}
        try:
            for number, pid in pids.items():
                descriptor = os.pidfd_open(pid)
                self._number_of[descriptor] = number
                self._poll.register(descriptor, select.POLLIN)
        except OSError:
            self.close()
            raise

    def ended(self) -> list[int]:
        """Numbers of those that have ended."""
        return [self._number_of[descriptor] for descriptor, _ in self._poll.poll(0)]

    def close(self) -> None:
        for descriptor in self._number_of:
            self._poll.unregister(descriptor)
            os.close(descriptor)
        self._number_of.clear()
