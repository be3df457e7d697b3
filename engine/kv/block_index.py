"""The index of cached blocks: (data index, block hash) -> page, as one vectorised hash table.

Open addressing with linear probing over numpy arrays: a step's look-ups and insertions are a
handful of array operations, and no page is a Python object. An entry is a page, and above its bits
as many of its key as an int32 has room for; the whole key is kept in arrays by page, next to the
other pages of its prompt. So a search touches one distant place, and another only where it finds
the page.

Each place counts the entries that were moved past it. A place whose entry is removed becomes a
tombstone, which searches step over, only while that count is not zero. Probe lengths therefore
stay short for however long the table lives.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...kernels.splitmix import mix64
from ..protocol.arrays import Int32, Int64, UInt64, ragged

_EMPTY = np.int32(-1)
_TOMBSTONE = np.int32(-2)
_WINDOW = np.arange(8)
"""Places that a search looks at together: most reach an empty one within them."""


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
        self._table = np.full(size, _EMPTY, np.int32)
        self._passed = np.zeros(size, np.int32)
        self._page_bits = np.int32((1 << max(1, capacity - 1).bit_length()) - 1)
        self._entry_of_page = np.full(capacity, -1, np.int32)
        self._home_of_page = np.zeros(capacity, np.int32)
        self._key_a = np.zeros(capacity, np.uint64)
        self._key_b = np.zeros(capacity, np.uint64)
        self._salt = mix64(np.arange(1, num_data + 1, dtype=np.uint64))
        self._reach = np.arange(num_data + len(_WINDOW))
        self.size = 0

    def find(self, data: Int64, keys: UInt64) -> Int64:
        """Pages of (data [n], keys [n, 2]); -1 where there is none."""
        return self._search(keys[:, 0] ^ self._salt[data], keys[:, 1], self._home(data, keys))[0]

    def find_everywhere(self, keys: UInt64) -> Int64:
        """Pages of keys [n, 2] on all data indices [n, D]; -1 where there is none."""
        num_data = len(self._salt)
        start = keys[:, 0].astype(np.int64)
        entries = self._table[(start[:, None] + self._reach) & self._mask]
        found = np.full((len(keys), num_data), -1, np.int64)
        key, place = (entries & ~self._page_bits == self._tag(keys[:, 1])[:, None]).nonzero()
        if key.size:
            page = entries[key, place] & self._page_bits
            data = (self._home_of_page[page] - start[key]) & self._mask
            near = (data < num_data).nonzero()[0]
            key, page, data = key[near], page[near], data[near]
            same = self.names(data, keys[key], page)
            found[key[same], data[same]] = page[same]
        # Entries of a key end before the first empty place behind the last home.
        further = (entries[:, num_data - 1 :] != _EMPTY).all(axis=1).nonzero()[0]
        for key in further.tolist():
            found[key] = self.find(np.arange(num_data), keys[key].repeat(num_data).reshape(2, -1).T)
        return found

    def insert(self, data: Int64, keys: UInt64, pages: Int64) -> NDArray[np.bool_]:
        """Enters pages [n], which have no entry yet, under (data [n], keys [n, 2]).

        Returns which were entered: an existing entry of that name stays, and of equal names in one
        call the last one wins.
        """
        key_a, key_b, home = keys[:, 0] ^ self._salt[data], keys[:, 1], self._home(data, keys)
        self._key_a[pages], self._key_b[pages], self._home_of_page[pages] = key_a, key_b, home
        entries = self._tag(key_b) | pages.astype(np.int32)
        found, at = self._search(key_a, key_b, home)
        taken = np.zeros(len(pages), np.bool_)
        todo = (found < 0).nonzero()[0]
        self._table[at[todo]] = entries[todo]
        while todo.size:
            there = self._table[at[todo]]
            won = there == entries[todo]
            taken[todo[won]] = True
            if won.all():
                break
            # A loser whose key the winner has is a duplicate within this call.
            page = there & self._page_bits
            todo = todo[~won & ((self._key_a[page] != key_a[todo]) | (self._key_b[page] != key_b[todo]))]
            at[todo] = (at[todo] + 1) & self._mask
            free = todo[self._table[at[todo]] < 0]
            self._table[at[free]] = entries[free]
        at, pages = at[taken], pages[taken]
        self._entry_of_page[pages] = at
        self.size += len(pages)
        self._pass(home[taken], at, 1)
        return taken

    def remove(self, pages: Int64) -> None:
        """Removes the entries of pages [n] that have one."""
        pages = pages[self.holds(pages)]
        if not len(pages):
            return
        entries = self._entry_of_page[pages]
        self._entry_of_page[pages] = -1
        self._table[entries] = np.where(self._passed[entries] > 0, _TOMBSTONE, _EMPTY)
        self.size -= len(pages)
        places = self._pass(self._home_of_page[pages], entries, -1)
        self._table[places[(self._passed[places] == 0) & (self._table[places] == _TOMBSTONE)]] = _EMPTY

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
        pages: Int64 = ((references[span] == 0) & (self._entry_of_page[span] >= 0)).nonzero()[0] + first
        return pages

    def check(self) -> None:
        """Integrity: both directions agree and the size is right. Raises AssertionError."""
        used = np.flatnonzero(self._table >= 0)
        pages = self._table[used] & self._page_bits
        assert len(used) == self.size, f"{len(used)} entries, size {self.size}"
        assert (self._entry_of_page[pages] == used).all(), "an entry and its page disagree"
        assert int((self._entry_of_page >= 0).sum()) == self.size, "a page points at a removed entry"
        distance = (used - self._home_of_page[pages]) & self._mask
        owners, steps = ragged(distance)
        passed = np.bincount((used[owners] - 1 - steps) & self._mask, minlength=len(self._passed))
        assert (passed == self._passed).all(), "places are not passed by as many entries as counted"
        assert (self._table[passed > 0] != _EMPTY).all(), "a search stops before an entry"
        assert (self._table[passed == 0] != _TOMBSTONE).all(), "a tombstone is left behind"

    def _home(self, data: Int64, keys: UInt64) -> Int64:
        """The place at which the search for each of (data [n], keys [n, 2]) starts."""
        home: Int64 = (keys[:, 0].astype(np.int64) + data) & self._mask
        return home

    def _tag(self, key_b: UInt64) -> Int32:
        """The bits of keys [n] that their entries carry beside the page."""
        tag: Int32 = key_b.astype(np.int32) & ~self._page_bits & np.int32(0x7FFFFFFF)
        return tag

    def _search(self, key_a: UInt64, key_b: UInt64, home: Int64) -> tuple[Int64, Int64]:
        """Searches keys [n] from ``home`` [n] on. Returns their pages, -1 where there is none, and
        the first free place on the way.
        """
        found = np.full(len(home), -1, np.int64)
        free = home.copy()
        todo = (self._table[home] != _EMPTY).nonzero()[0]
        at, tag = home[todo], self._tag(key_b[todo])
        free[todo] = -1
        while todo.size:
            entries = self._table[(at[:, None] + _WINDOW) & self._mask]
            row, column = (entries & ~self._page_bits == tag[:, None]).nonzero()
            if row.size:
                page, asked = entries[row, column] & self._page_bits, todo[row]
                same = (self._key_a[page] == key_a[asked]) & (self._key_b[page] == key_b[asked])
                found[asked[same]] = page[same]
            vacant = entries < 0
            fresh = ((free[todo] < 0) & _any(vacant)).nonzero()[0]
            free[todo[fresh]] = at[fresh] + vacant[fresh].argmax(axis=1)
            left = ((found[todo] < 0) & ~_any(entries == _EMPTY)).nonzero()[0]
            todo, at, tag = todo[left], at[left] + len(_WINDOW), tag[left]
        free &= self._mask
        return found, free

    def _pass(self, homes: NDArray[np.integer[Any]], entries: NDArray[np.integer[Any]], change: int) -> Int64:
        """Adds ``change`` to the counts of all places between ``homes`` [n] and ``entries`` [n].
        Returns those places.
        """
        moved = (entries != homes).nonzero()[0]
        first = homes[moved].astype(np.int64)
        counts = (entries[moved] - first) & self._mask
        ends = counts.cumsum()
        places: Int64 = np.repeat(first - ends + counts, counts)
        places += np.arange(len(places))
        places &= self._mask
        np.add.at(self._passed, places, np.int32(change))
        return places


def _any(windows: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Whether each of windows [n, 8] has a true place; numpy is slow along a short dimension."""
    some: NDArray[np.bool_] = windows.view(np.uint64)[:, 0] != 0
    return some
