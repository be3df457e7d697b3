"""Token sequences that one request may not write: which tokens they forbid next."""

from __future__ import annotations

import numpy as np

from ..protocol.arrays import Int32, Int64

_END = -1


class BadWords:
    """Follows the output of one request. It depends on the tokens emitted so far alone, so a
    preemption or a replay changes nothing.

    ``packed`` are the sequences, each ended by -1. Sequences are found by their leading tokens: a
    token costs one look-up for each length that sequences have, however many there are.
    """

    def __init__(self, packed: Int32, emitted: Int32) -> None:
        self._last_by_prefix: dict[tuple[int, ...], list[int]] = {}
        word: list[int] = []
        for token in packed.tolist():
            if token == _END:
                self._last_by_prefix.setdefault(tuple(word[:-1]), []).append(word[-1])
                word = []
            else:
                word.append(token)
        self._always = np.array(sorted(set(self._last_by_prefix.pop((), []))), np.int64)
        self._lengths = sorted({len(prefix) for prefix in self._last_by_prefix})
        self._reach = max(self._lengths, default=0)
        self._tail: list[int] = emitted[max(0, len(emitted) - self._reach) :].tolist()

    def add(self, token: int) -> None:
        """Takes the next token of the output."""
        if self._reach:
            self._tail.append(token)
            del self._tail[: -self._reach]

    @property
    def forbidden(self) -> Int64:
        """The tokens that would complete a sequence, each once and in no order."""
        if not self._reach:
            return self._always
        found: set[int] = set()
        for length in self._lengths:
            if length > len(self._tail):
                break
            found.update(self._last_by_prefix.get(tuple(self._tail[-length:]), ()))
        found.difference_update(self._always.tolist())
        return np.concatenate([self._always, np.array(sorted(found), np.int64)]) if found else self._always
