"""Memory that all frontends of a cluster share: each writes what it has counted, any can read what
all have counted.

The launcher makes it and keeps it, so that a frontend that is restarted goes on from the counts of
the one before it.
"""

from __future__ import annotations

import mmap
import os
import struct

SLOT_BYTES = 1 << 22  # taken from the machine as far as it is written
_HEAD = struct.Struct("@Q")
_BODY = SLOT_BYTES // 2 - _HEAD.size
_READS = 100


def board_bytes(num_frontends: int) -> int:
    """Size of the memory for so many frontends."""
    return num_frontends * SLOT_BYTES


class Board:
    """The slot ``index`` is this process's to write. Takes the descriptor over.

    A slot is two buffers; the number at its head says which is valid and how often it was written.
    A writer fills the other one and then counts up, so that one that is killed while writing leaves
    the last text whole.
    """

    def __init__(self, descriptor: int, index: int) -> None:
        size = os.fstat(descriptor).st_size
        self._memory = mmap.mmap(descriptor, size)
        os.close(descriptor)
        self._num_slots = size // SLOT_BYTES
        self._words = memoryview(self._memory).cast("Q")  # a store of a word is one store, unlike struct's
        assert 0 <= index < self._num_slots, f"slot {index} of {self._num_slots}"
        self._index = index

    def write(self, text: bytes) -> None:
        """Replaces this process's text. Raises ValueError for one that does not fit."""
        room = _BODY - 2 * _HEAD.size
        if len(text) > room:
            raise ValueError(f"the counts of a frontend are {len(text)} bytes, its slot holds {room}")
        turn = self._turn(self._index) + 1
        start = self._body(self._index, turn)
        _HEAD.pack_into(self._memory, start, len(text))
        self._memory[start + _HEAD.size : start + _HEAD.size + len(text)] = text
        self._words[self._index * SLOT_BYTES // _HEAD.size] = turn

    def own(self) -> bytes:
        """What this slot holds, also from an earlier process; empty when nothing was written."""
        return self._read(self._index)

    def others(self) -> list[bytes]:
        """What the other slots hold, without the empty ones."""
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
