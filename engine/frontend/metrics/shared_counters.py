"""Memory that all frontends of a cluster share: each writes its counts, and each can read all.

The launcher makes and keeps it, so a restarted frontend goes on from the counts before.
"""

from __future__ import annotations

import mmap
import os
import struct

SLOT_BYTES = 1 << 22  # the machine gives only the pages that are written
_HEAD = struct.Struct("@Q")
_BODY = SLOT_BYTES // 2 - _HEAD.size
_READS = 100


def shared_bytes(num_frontends: int) -> int:
    """Size of the memory for ``num_frontends``."""
    return num_frontends * SLOT_BYTES


class SharedCounters:
    """Packed counters by frontend; this process writes slot ``index``. Owns the descriptor.

    A slot has two buffers; the number at its head counts writes and so selects the valid one. A
    writer fills the other buffer, then increments the number: a killed writer leaves the last text
    intact.
    """

    def __init__(self, descriptor: int, index: int) -> None:
        size = os.fstat(descriptor).st_size
        self._memory = mmap.mmap(descriptor, size)
        os.close(descriptor)
        self._num_slots = size // SLOT_BYTES
        self._words = memoryview(self._memory).cast("Q")  # writes a word in one store, which struct does not
        assert 0 <= index < self._num_slots, f"slot {index} of {self._num_slots}"
        self._index = index

    @property
    def alone(self) -> bool:
        """Whether there is no other frontend."""
        return self._num_slots == 1

    def write(self, text: bytes) -> None:
        """Replaces this process's text. Raises ValueError if it does not fit."""
        room = _BODY - 2 * _HEAD.size
        if len(text) > room:
            raise ValueError(f"the counts of a frontend are {len(text)} bytes, its slot holds {room}")
        turn = self._turn(self._index) + 1
        start = self._body(self._index, turn)
        _HEAD.pack_into(self._memory, start, len(text))
        self._memory[start + _HEAD.size : start + _HEAD.size + len(text)] = text
        self._words[self._index * SLOT_BYTES // _HEAD.size] = turn

    def own(self) -> bytes:
        """The text of this slot, also if an earlier process wrote it; empty if none did."""
        return self._read(self._index)

    def others(self) -> list[bytes]:
        """The texts of the other slots, without empty ones."""
        texts = [self._read(index) for index in range(self._num_slots) if index != self._index]
        return [text for text in texts if text]

    def _turn(self, index: int) -> int:
        return self._words[index * SLOT_BYTES // _HEAD.size]

    def _body(self, index: int, turn: int) -> int:
        return index * SLOT_BYTES + _HEAD.size + turn % 2 * _BODY

    def _read(self, index: int) -> bytes:
        for _ in range(_READS):
            turn = self._turn(index)
            if turn == 0:
                return b""
            start = self._body(index, turn)
            [length] = _HEAD.unpack_from(self._memory, start)
            text = self._memory[start + _HEAD.size : start + _HEAD.size + length]
            if self._turn(index) == turn:  # the writer fills the other buffer until it counts up
                return text
        raise AssertionError(f"slot {index} was written faster than it could be read, {_READS} times")
