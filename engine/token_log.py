"""The controller's token log: the sampled tokens of every running row, and so the truth about each request."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .slots import Int32, Int64

_CHUNK = 64


class TokenLog:
    """Append-only token lists of ``num_rows`` rows, in chunks of 64 tokens from one growing pool."""

    def __init__(self, num_rows: int) -> None:
        self.count = np.zeros(num_rows, np.int64)
        self._table = np.zeros((num_rows, 8), np.int64)
        self._pool = np.zeros((max(64, 2 * num_rows), _CHUNK), np.int32)
        self._free = np.arange(len(self._pool) - 1, -1, -1, dtype=np.int64)
        self._num_free = len(self._pool)

    def append(self, rows: Int64, tokens: Int32) -> None:
        """Appends one token to each of rows [n], which are distinct."""
        count = self.count[rows]
        index, offset = count // _CHUNK, count % _CHUNK
        opening = offset == 0
        if opening.any():
            self._open(rows[opening], index[opening])
        self._pool[self._table[rows, index], offset] = tokens
        self.count[rows] = count + 1

    def append_ragged(self, rows: Int64, counts: Int64, tokens: Int32) -> None:
        """Appends ``counts[i]`` tokens to rows [n]; tokens are concatenated in that order."""
        starts = np.cumsum(counts) - counts
        for step in range(int(counts.max(initial=0))):
            more = counts > step
            self.append(rows[more], tokens[starts[more] + step])

    def read(self, row: int) -> Int32:
        """The tokens of ``row`` as a fresh array."""
        count = int(self.count[row])
        chunks = self._table[row, : -(-count // _CHUNK)]
        return self._pool[chunks].reshape(-1)[:count].copy()

    def clear(self, row: int) -> None:
        """Empties ``row``."""
        chunks = self._table[row, : -(-int(self.count[row]) // _CHUNK)]
        self._free[self._num_free : self._num_free + len(chunks)] = chunks
        self._num_free += len(chunks)
        self.count[row] = 0

    def _open(self, rows: Int64, index: NDArray[np.int64]) -> None:
        while self._num_free < len(rows):
            self._grow_pool()
        while int(index.max()) >= self._table.shape[1]:
            self._table = np.concatenate([self._table, np.zeros_like(self._table)], axis=1)
        self._num_free -= len(rows)
        self._table[rows, index] = self._free[self._num_free : self._num_free + len(rows)]

    def _grow_pool(self) -> None:
        old = len(self._pool)
        self._pool = np.concatenate([self._pool, np.zeros_like(self._pool)])
        self._free = np.concatenate([self._free, np.zeros_like(self._free)])
        self._free[self._num_free : self._num_free + old] = np.arange(2 * old - 1, old - 1, -1)
        self._num_free += old
