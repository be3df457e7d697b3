"""The controller's token log: the sampled tokens of every running row, and so the truth about each request."""

from __future__ import annotations

import numpy as np

from .slots import Int32, Int64

_CHUNK = 64


class TokenLog:
    """Append-only token lists of ``num_rows`` rows, in chunks of 64 tokens from one growing pool."""

    def __init__(self, num_rows: int) -> None:
        self.count = np.zeros(num_rows, np.int64)
        self._cursor = np.zeros(num_rows, np.int64)  # where a row's next token goes in the flat pool; 0 modulo the chunk: nowhere yet
        self._table = np.zeros((num_rows, 8), np.int64)
        self._pool = np.zeros(max(64, 2 * num_rows) * _CHUNK, np.int32)
        self._free = np.arange(len(self._pool) // _CHUNK - 1, -1, -1, dtype=np.int64)
        self._num_free = len(self._free)

    def append(self, rows: Int64, tokens: Int32) -> None:
        """Appends one token to each of rows [n], which are distinct."""
        cursor = self._cursor[rows]
        full = (cursor % _CHUNK == 0).nonzero()[0]
        if len(full):
            cursor[full] = self._open(rows[full])
        self._pool[cursor] = tokens
        self._cursor[rows] = cursor + 1
        self.count[rows] += 1

    def append_ragged(self, rows: Int64, counts: Int64, tokens: Int32) -> None:
        """Appends ``counts[i]`` tokens to rows [n]; tokens are concatenated in that order."""
        starts = np.cumsum(counts) - counts
        for step in range(int(counts.max(initial=0))):
            more = counts > step
            self.append(rows[more], tokens[starts[more] + step])

    def read(self, row: int) -> Int32:
        """The tokens of ``row`` as a fresh array."""
        count = int(self.count[row])
        chunks = self._table[row, : -(-count // _CHUNK)].tolist()
        pieces = [self._pool[chunk * _CHUNK : (chunk + 1) * _CHUNK] for chunk in chunks]
        return np.concatenate(pieces)[:count] if pieces else np.zeros(0, np.int32)

    def clear(self, row: int) -> None:
        """Empties ``row``."""
        num_chunks = -(-int(self.count[row]) // _CHUNK)
        self._free[self._num_free : self._num_free + num_chunks] = self._table[row, :num_chunks]
        self._num_free += num_chunks
        self.count[row] = self._cursor[row] = 0

    def _open(self, rows: Int64) -> Int64:
        """Gives each of rows [n] its next chunk; where it starts in the flat pool."""
        index = self.count[rows] // _CHUNK
        while self._num_free < len(rows):
            self._grow_pool()
        while int(index.max()) >= self._table.shape[1]:
            self._table = np.concatenate([self._table, np.zeros_like(self._table)], axis=1)
        self._num_free -= len(rows)
        chunks = self._free[self._num_free : self._num_free + len(rows)]
        self._table[rows, index] = chunks
        return chunks * _CHUNK

    def _grow_pool(self) -> None:
        old = len(self._pool) // _CHUNK
        self._pool = np.concatenate([self._pool, np.zeros_like(self._pool)])
        self._free = np.concatenate([self._free, np.zeros_like(self._free)])
        self._free[self._num_free : self._num_free + old] = np.arange(2 * old - 1, old - 1, -1)
        self._num_free += old
