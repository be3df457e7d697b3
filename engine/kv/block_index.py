"""The index of cached blocks: (data index, block hash) -> page, as one vectorised hash table.

Open addressing with linear probing over numpy arrays: a step's look-ups and insertions are a
handful of array operations, and no page is a Python object. The table holds only pages; a page's
key is kept in arrays by page, next to the other pages of its prompt, so that a look-up touches one
distant place instead of four.

Each place counts the entries that were moved past it. A place whose entry is removed becomes a
tombstone, which searches step over, only while that count is not zero. Probe lengths therefore
stay short for however long the table lives.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...kernels.splitmix import mix64
from ..protocol.arrays import Int64, UInt64, ragged

_EMPTY = -1
_TOMBSTONE = -2


class BlockIndex:
    """Maps (data index, hash) to a page; all methods take equally long vectors.

    ``capacity`` is the largest number of entries, at most one per page; the table is at most a
    quarter full. The search for a block starts at its hash + its data index, so that the places of
    one block on all data indices are neighbours.
    """

    def __init__(self, capacity: int, num_data: int) -> None:
        size = 64
        while size < 4 * capacity:
            size *= 2
        self._mask = np.int64(size - 1)
        self._page = np.full(size, _EMPTY, np.int32)
        self._passed = np.zeros(size, np.int32)
        self._entry_of_page = np.full(capacity, -1, np.int32)
        self._home_of_page = np.zeros(capacity, np.int32)
        self._key_a = np.zeros(capacity, np.uint64)
        self._key_b = np.zeros(capacity, np.uint64)
        self._salt = mix64(np.arange(1, num_data + 1, dtype=np.uint64))
        self.size = 0

    def find(self, data: Int64, keys: UInt64) -> Int64:
        """Pages of (data [n], keys [n, 2]); -1 where there is none."""
        return self._search(keys[:, 0] ^ self._salt[data], keys[:, 1], self._home(data, keys))[0]

    def insert(self, data: Int64, keys: UInt64, pages: Int64) -> NDArray[np.bool_]:
        """Enters pages [n], which have no entry yet, under (data [n], keys [n, 2]).

        Returns which were entered: an existing entry of that name stays, and of equal names in one
        call the last one wins.
        """
        key_a, key_b, home = keys[:, 0] ^ self._salt[data], keys[:, 1], self._home(data, keys)
        self._key_a[pages], self._key_b[pages], self._home_of_page[pages] = key_a, key_b, home
        found, at = self._search(key_a, key_b, home)
        taken = np.zeros(len(pages), np.bool_)
        todo = (found < 0).nonzero()[0]
        while todo.size:
            places, own = at[todo], pages[todo]
            free = self._page[places] < 0
            self._page[places[free]] = own[free]
            there = self._page[places]
            won = there == own
            self._entry_of_page[own[won]] = places[won]
            taken[todo[won]] = True
            # A loser whose key the winner has is a duplicate within this call.
            todo = todo[~won & ((self._key_a[there] != key_a[todo]) | (self._key_b[there] != key_b[todo]))]
            at[todo] = (at[todo] + 1) & self._mask
        self.size += int(np.count_nonzero(taken))
        self._pass(home[taken], at[taken], 1)
        return taken

    def remove(self, pages: Int64) -> None:
        """Removes the entries of pages [n] that have one."""
        pages = pages[self._entry_of_page[pages] >= 0]
        entries = self._entry_of_page[pages]
        self._entry_of_page[pages] = -1
        self._page[entries] = np.where(self._passed[entries] > 0, _TOMBSTONE, _EMPTY)
        self.size -= len(pages)
        self._pass(self._home_of_page[pages], entries, -1)

    def holds(self, pages: Int64) -> NDArray[np.bool_]:
        """Whether each page has an entry."""
        return self._entry_of_page[pages] >= 0

    def keys(self, data: Int64, pages: Int64) -> UInt64:
        """The keys [n, 2] under which pages [n] of data [n] are entered."""
        return np.stack((self._key_a[pages] ^ self._salt[data], self._key_b[pages]), axis=1)

    def names(self, data: Int64, keys: UInt64, pages: Int64) -> NDArray[np.bool_]:
        """Whether each of pages [n] is entered under its (data, key); cheaper than ``find``."""
        same: NDArray[np.bool_] = (self._key_a[pages] == keys[:, 0] ^ self._salt[data]) & (
            self._key_b[pages] == keys[:, 1]
        )
        return same & self.holds(pages)

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
        distance = (used - self._home_of_page[self._page[used]]) & self._mask
        owners, steps = ragged(distance)
        passed = np.bincount((used[owners] - 1 - steps) & self._mask, minlength=len(self._passed))
        assert (passed == self._passed).all(), "places are not passed by as many entries as counted"
        assert (self._page[passed > 0] != _EMPTY).all(), "a search stops before an entry"
        assert (self._page[passed == 0] != _TOMBSTONE).all(), "a tombstone is left behind"

    def _home(self, data: Int64, keys: UInt64) -> Int64:
        """The place at which the search for each of (data [n], keys [n, 2]) starts."""
        home: Int64 = (keys[:, 0].astype(np.int64) + data) & self._mask
        return home

    def _search(self, key_a: UInt64, key_b: UInt64, home: Int64) -> tuple[Int64, Int64]:
        """Searches keys [n] from ``home`` [n] on. Returns their pages, -1 where there is none, and
        the first free place on the way.
        """
        found, free = np.full(len(home), -1, np.int64), home.copy()
        page = self._page[home]
        todo = (page != _EMPTY).nonzero()[0]
        at, page = home[todo], page[todo]
        settled = page < 0
        while todo.size:
            match = (self._key_a[page] == key_a[todo]) & (self._key_b[page] == key_b[todo]) & (page >= 0)
            found[todo[match]] = page[match]
            at = (at + 1) & self._mask
            free[todo] = np.where(settled, free[todo], at)
            page = self._page[at]
            settled |= page < 0
            left = (~match & (page != _EMPTY)).nonzero()[0]
            todo, at, page, settled = todo[left], at[left], page[left], settled[left]
        return found, free

    def _pass(self, homes: NDArray[np.integer[Any]], entries: NDArray[np.integer[Any]], change: int) -> None:
        """Adds ``change`` to the counts of all places between ``homes`` [n] and ``entries`` [n]."""
        distance = (entries - homes) & self._mask
        moved = distance.nonzero()[0]
        if moved.size:
            owners, steps = ragged(distance[moved])
            places = (homes[moved][owners] + steps) & self._mask
            np.add.at(self._passed, places, np.int32(change))
            self._page[places[(self._passed[places] == 0) & (self._page[places] == _TOMBSTONE)]] = _EMPTY
