"""The token log: the sampled tokens of every running row. They define the state of a request."""

from __future__ import annotations

import numpy as np

from ..protocol.arrays import Int32, Int64, ragged

_CHUNK = 64


class TokenLog:
    """Append-only token lists of ``num_rows`` rows, in chunks of 64 tokens from a growing pool."""

    def __init__(self, num_rows: int) -> None:
        self.count = np.zeros(num_rows, np.int64)
        # Index in the flat pool at which a row's token 0 would be if its open chunk began there.
        self._origin = np.zeros(num_rows, np.int64)
        self._table = np.zeros((num_rows, 8), np.int64)
        self._pool = np.zeros(max(64, 2 * num_rows) * _CHUNK, np.int32)
        self._free = np.arange(len(self._pool) // _CHUNK - 1, -1, -1, dtype=np.int64)
        self._num_free = len(self._free)

    def append(self, rows: Int64, tokens: Int32) -> Int64:
        """Appends one token to each of rows [n], which are distinct. Returns the counts before."""
        count = self.count[rows]
        full = (count & (_CHUNK - 1) == 0).nonzero()[0]
        if len(full):
            self._open(rows[full], count[full])
        self._pool[self._origin[rows] + count] = tokens
        self.count[rows] = count + 1
        return count

    def append_ragged(self, rows: Int64, counts: Int64, tokens: Int32) -> Int64:
        """Appends ``counts`` [n] of the joined tokens to rows [n]. Returns the counts before."""
        before = self.count[rows]
        starts = np.cumsum(counts) - counts
        for step in range(int(counts.max(initial=0))):
            more = counts > step
            self.append(rows[more], tokens[starts[more] + step])
        return before

    def read(self, rows: Int64) -> list[bytes]:
        """The tokens of each of rows [n], int32."""
        counts = self.count[rows]
        chunks, num_chunks = self._chunks(rows)
        tokens = self._pool.reshape(-1, _CHUNK)[chunks].tobytes()
        starts = (4 * _CHUNK * (np.cumsum(num_chunks) - num_chunks)).tolist()
        return [
            tokens[start : start + 4 * count] for start, count in zip(starts, counts.tolist(), strict=True)
        ]

    def clear(self, rows: Int64) -> None:
        """Empties rows [n]."""
        chunks, _ = self._chunks(rows)
        self._free[self._num_free : self._num_free + len(chunks)] = chunks
        self._num_free += len(chunks)
        self.count[rows] = 0

    def _chunks(self, rows: Int64) -> tuple[Int64, Int64]:
        """The chunks of rows [n] end to end, and the number that each row has."""
        num_chunks = -(-self.count[rows] // _CHUNK)
        owners, index = ragged(num_chunks)
        return self._table[rows[owners], index], num_chunks

    def _open(self, rows: Int64, counts: Int64) -> None:
        """Gives each of rows [n], which have ``counts`` tokens, its next chunk."""
        index = counts // _CHUNK
        while self._num_free < len(rows):
            self._grow_pool()
        while int(index.max()) >= self._table.shape[1]:
            self._table = np.concatenate([self._table, np.zeros_like(self._table)], axis=1)
        self._num_free -= len(rows)
        chunks = self._free[self._num_free : self._num_free + len(rows)]
        self._table[rows, index] = chunks
        self._origin[rows] = chunks * _CHUNK - counts

    def _grow_pool(self) -> None:
        old = len(self._pool) // _CHUNK
        pool = np.empty(2 * len(self._pool), np.int32)
        pool[: len(self._pool)] = self._pool
        self._pool = pool
        self._free = np.concatenate([self._free, np.zeros_like(self._free)])
        self._free[self._num_free : self._num_free + old] = np.arange(2 * old - 1, old - 1, -1)
        self._num_free += old
