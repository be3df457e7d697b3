"""The index of cached blocks: (data index, block hash) -> page, as one vectorised hash table.

Open addressing with linear probing over numpy arrays, so that a step's look-ups and insertions are a handful of
array operations and no page is a Python object. Deleted entries become tombstones, which are cleared as soon as the
entry behind them is empty; probe lengths therefore stay short however long the table lives.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..slots import mix64

UInt64 = NDArray[np.uint64]
Int64 = NDArray[np.int64]

_EMPTY = -1
_TOMBSTONE = -2


def as_keys(hashes_h128: bytes) -> UInt64:
    """Packed hashes as uint64 [n, 2]."""
    return np.frombuffer(hashes_h128, "<u8").reshape(-1, 2)


class BlockIndex:
    """Maps (data index, hash) to a page id; all methods take equally long vectors.

    ``capacity`` is the largest number of entries (one per page at most); the table is kept at most a quarter full.
    """

    def __init__(self, capacity: int, num_data: int) -> None:
        size = 64
        while size < 4 * capacity:
            size *= 2
        self._mask = np.int64(size - 1)
        self._key_a = np.zeros(size, np.uint64)
        self._key_b = np.zeros(size, np.uint64)
        self._page = np.full(size, _EMPTY, np.int64)
        self._claim = np.zeros(size, np.int64)
        self._salt = mix64(np.arange(1, num_data + 1, dtype=np.uint64))
        self._entry_of_page = np.full(capacity, -1, np.int64)
        self._capacity = capacity
        self.size = 0

    def find(self, data: Int64, keys: UInt64) -> Int64:
        """Pages of (data [n], keys [n, 2]); -1 where there is none."""
        key_a, key_b = keys[:, 0] ^ self._salt[data], keys[:, 1]
        where = (key_a.astype(np.int64)) & self._mask
        found = np.full(len(where), -1, np.int64)
        todo = np.arange(len(where))
        while todo.size:
            at = where[todo]
            page = self._page[at]
            match = (page >= 0) & (self._key_a[at] == key_a[todo]) & (self._key_b[at] == key_b[todo])
            found[todo[match]] = page[match]
            todo = todo[~match & (page != _EMPTY)]
            where[todo] = (where[todo] + 1) & self._mask
        return found

    def insert(self, data: Int64, keys: UInt64, pages: Int64) -> NDArray[np.bool_]:
        """Adds entries; an entry that exists keeps its page. pages [n] are unique and not yet in the index.

        Returns [n]: whether the page was taken in.
        """
        key_a, key_b = keys[:, 0] ^ self._salt[data], keys[:, 1]
        taken = np.zeros(len(pages), np.bool_)
        todo = np.flatnonzero(self.find(data, keys) < 0)
        where = key_a.astype(np.int64) & self._mask
        while todo.size:
            at = where[todo]
            free = self._page[at] < 0
            self._claim[at[free]] = todo[free]
            won = free & (self._claim[at] == todo)
            winners, spots = todo[won], at[won]
            self._key_a[spots], self._key_b[spots], self._page[spots] = key_a[winners], key_b[winners], pages[winners]
            self._entry_of_page[pages[winners]] = spots
            taken[winners] = True
            # A loser whose key the winner has just written is a duplicate within this call.
            duplicate = ~won & (self._page[at] >= 0) & (self._key_a[at] == key_a[todo]) & (self._key_b[at] == key_b[todo])
            todo = todo[~won & ~duplicate]
            where[todo] = (where[todo] + 1) & self._mask
        self.size += int(taken.sum())
        return taken

    def remove(self, pages: Int64) -> None:
        """Removes the entries of pages [n] that have one."""
        entries = self._entry_of_page[pages]
        entries = entries[entries >= 0]
        self._entry_of_page[pages] = -1
        self._page[entries] = _TOMBSTONE
        self.size -= len(entries)
        while entries.size:
            entries = entries[(self._page[entries] == _TOMBSTONE) & (self._page[(entries + 1) & self._mask] == _EMPTY)]
            self._page[entries] = _EMPTY
            entries = (entries - 1) & self._mask

    def holds(self, pages: Int64) -> NDArray[np.bool_]:
        """Whether each page has an entry."""
        return self._entry_of_page[pages] >= 0

    def names(self, data: Int64, keys: UInt64, pages: Int64) -> NDArray[np.bool_]:
        """Whether the index knows each of pages [n] under just this (data, key); cheaper than ``find``."""
        entries = self._entry_of_page[pages]
        same: NDArray[np.bool_] = (self._key_a[entries] == keys[:, 0] ^ self._salt[data]) & (self._key_b[entries] == keys[:, 1])
        return same & (entries >= 0)

    def evictable(self, references: NDArray[np.int32], first: int, count: int) -> Int64:
        """Indexed pages of [first, first + count) without references."""
        span = slice(first, first + count)
        return np.flatnonzero((references[span] == 0) & (self._entry_of_page[span] >= 0)) + first

    def check(self) -> None:
        """Integrity: both directions agree and the size is right. Raises AssertionError."""
        used = np.flatnonzero(self._page >= 0)
        assert len(used) == self.size, f"{len(used)} entries, size {self.size}"
        assert (self._entry_of_page[self._page[used]] == used).all(), "an entry and its page disagree"
        assert int((self._entry_of_page >= 0).sum()) == self.size, "a page points at a removed entry"
