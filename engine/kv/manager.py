"""The KV manager: one index over the page pools of all data indices.

A page is free (on its pool's stack), referenced (by one or more rows) or cached (unreferenced, but
found by its hash; evicted least recently used first). Pages have global ids; ranks know them by
local ids within their pool. All bookkeeping is numpy: no Python object stands for a page or a
token.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ..protocol.arrays import Int64, UInt64, as_keys, ragged
from ..protocol.message import HASH_BYTES
from .block_index import BlockIndex

_PENDING = np.iinfo(np.int64).max
"""Step of a page that is reserved for a block but not yet scheduled to be computed."""

_ADOPTED = -1
"""Step of a block that was written before the first step of this controller."""

_EVICT_SHARE = 32
"""A pool that runs out evicts at least 1 / 32 of itself, so that few admissions have to search."""

_DEPTH_BITS = 20

_NO_PAGES = np.zeros(0, np.int64)


class KVManager:
    """Page pools, reference counts, the block index and eviction. ``num_pages`` [D] are the sizes
    of the pools. ``removed`` hears the keys [n, 2] of written blocks that leave the index.
    """

    def __init__(
        self,
        num_pages: list[int],
        page_size: int,
        *,
        caching: bool = True,
        removed: Callable[[UInt64], None] | None = None,
    ) -> None:
        self.page_size = page_size
        self.caching = caching
        self.num_data = len(num_pages)
        self.num_pages = np.array(num_pages, np.int64)
        self._max_pages = int(self.num_pages.max(initial=1))
        total = self.num_data * self._max_pages
        self._references = np.zeros(total, np.int32)
        self._stamp = np.zeros(total, np.int64)
        self._written = np.full(total, _PENDING, np.int64)
        self._untold = np.zeros(total, np.bool_)  # blocks of an earlier controller, see take_untold
        self._removed = removed
        self.index = BlockIndex(total, self.num_data)
        # Stacks hand out low page ids first: easier to read in a dump.
        self._stack = np.tile(np.arange(self._max_pages - 1, -1, -1, dtype=np.int64), (self.num_data, 1))
        self._top = self.num_pages.copy()
        for data, count in enumerate(num_pages):
            self._stack[data, :count] = np.arange(count - 1, -1, -1)
        self._cached = np.zeros(self.num_data, np.int64)
        self._clock = 0
        # Pages that count as taken already, as (data, place on its stack, number), and as evicted
        # already, as (place, number) by data.
        self._reserved: list[tuple[int, int, int]] = []
        self._evictions: dict[int, tuple[int, int]] = {}
        self._taken: list[Int64] = []

    # ----------------------------------------------------------------- questions

    def available_on(self, data: int) -> int:
        """Pages that can be had at once on ``data``: free, or cached and unreferenced."""
        return int(self._top[data] + self._cached[data])

    def cached(self) -> Int64:
        """Unreferenced pages [D] kept for their content."""
        return self._cached

    def used(self) -> Int64:
        """Referenced pages [D]."""
        return self.num_pages - self._top - self._cached

    def match(self, hashes: list[bytes], limits: list[int]) -> Int64:
        """Numbers of leading blocks that are cached [prompt, data], at most ``limits`` [prompt].

        ``hashes`` are packed; blocks that are announced but not yet written count. The first block
        is looked up on every data index; where it is found, bisection gives the length of the
        prefix, since a block is never evicted before its successors.
        """
        blocks = np.zeros((len(hashes), self.num_data), np.int64)
        asking = [i for i, limit in enumerate(limits) if limit > 0]
        if self.caching and self.index.size and asking:
            first = as_keys(b"".join([hashes[i][:HASH_BYTES] for i in asking]))
            prompts, data = (self.index.find_everywhere(first) >= 0).nonzero()
            if prompts.size:
                prompts = np.array(asking)[prompts]
                blocks[prompts, data] = self._bisect(hashes, limits, prompts, data)
        return blocks

    def prefix(self, data: int, hashes: bytes, num_blocks: int) -> Int64:
        """Global pages of the leading blocks on ``data``, cut at the first that is missing."""
        if num_blocks == 0:
            return _NO_PAGES
        if data in self._evictions:
            self._settle()
        pages = self.index.find(np.full(num_blocks, data), as_keys(hashes[: HASH_BYTES * num_blocks]))
        missing = np.flatnonzero(pages < 0)
        return pages[: missing[0]] if missing.size else pages

    def local(self, pages: Int64) -> Int64:
        """The ids that ranks know global pages [n] by."""
        return pages % self._max_pages

    # ----------------------------------------------------------------- taking and giving back

    def reserve(self, data: int, shared: Int64, fresh: int) -> bool:
        """References ``shared`` (global) pages of ``data`` and reserves ``fresh`` new ones for
        ``take_reserved``. Returns whether there is room.

        Which pages these are is settled for many reservations together. Until then ``data`` has
        fewer free pages and no page changes its content.
        """
        unreferenced = int((self._references[shared] == 0).sum()) if len(shared) else 0
        top = int(self._top[data])
        if top + self._cached[data] - unreferenced < fresh:
            return False
        if len(shared):
            self._references[shared] += 1
            self._cached[data] -= unreferenced
        if fresh > top:
            if any(owner == data for owner, *_ in self._reserved):  # they come before the evicted ones
                self._settle()
            self._evict_later(data, fresh - top)
            top = int(self._top[data])
        self._top[data] = top - fresh
        self._reserved.append((data, top - fresh, fresh))
        return True

    def take_reserved(self) -> Int64:
        """The new pages (global ids) of all reservations since the last call, end to end."""
        self._settle()
        taken, self._taken = self._taken, []
        return taken[0] if len(taken) == 1 else np.concatenate([_NO_PAGES, *taken])

    def short_of(self, wanted: Int64) -> Int64:
        """Evicts until each data index has ``wanted`` [D] free pages. Returns the data indices
        without enough.
        """
        short = (wanted > self._top).nonzero()[0]
        if short.size:
            for data in short.tolist():
                lacking = int(min(wanted[data] - self._top[data], self._cached[data]))
                if lacking:
                    self._evict_later(data, lacking)
            self._evict()
            short = short[wanted[short] > self._top[short]]
        return short

    def take_each(self, data: Int64) -> Int64:
        """Takes a fresh page (global id) for every entry of data [n], which ascends. Room must have
        been made.
        """
        ordinal = np.arange(len(data)) - data.searchsorted(data)
        pages = self._global(data, self._stack[data, self._top[data] - 1 - ordinal])
        self._top -= np.bincount(data, minlength=self.num_data)
        self._references[pages] = 1
        self._written[pages] = _PENDING
        return pages

    def release(self, data: Int64, counts: Int64, pages: Int64) -> None:
        """Drops one reference to every page of some rows. Pages that are hashed and written stay
        cached, the others become free.

        data [rows], counts [rows]: data index and number of pages of each row. pages
        [counts.sum()]: pages row by row, in block order.
        """
        rows, depth = ragged(counts)
        before = self._references[pages]
        np.subtract.at(self._references, pages, np.int32(1))
        left = self._references[pages]
        assert (left >= 0).all(), "a page was released twice"
        self._clock += 1
        # Deeper blocks are older, so that eviction shortens prefixes from their end.
        self._stamp[pages] = (self._clock << _DEPTH_BITS) - depth
        idle = (left == 0).nonzero()[0]
        if (before - left > 1).any():  # rows shared pages: count each once
            idle = idle[np.unique(pages[idle], return_index=True)[1]]
        done, owner = pages[idle], data[rows[idle]]
        keep = self.index.holds(done) & (self._written[done] != _PENDING)
        self._cached += np.bincount(owner[keep], minlength=self.num_data)
        gone = done[~keep]
        if len(gone):
            self._remove(gone)
            self._push_each(gone if len(counts) == 1 else np.sort(gone))

    # ----------------------------------------------------------------- content

    def announce(self, data: Int64, keys: UInt64, pages: Int64) -> NDArray[np.bool_]:
        """Enters blocks under their hashes. Returns which were entered: a block that has a page on
        its data index keeps it.
        """
        if not self.caching or not len(pages):
            return np.zeros(len(pages), np.bool_)
        return self.index.insert(data, keys, pages)

    def mark_written(self, pages: Int64, steps: int | Int64) -> None:
        """Plans ``steps``, one or one per page, write the blocks in pages [n]."""
        self._written[pages] = steps

    def is_pending(self, pages: Int64) -> bool:
        """Whether no plan has yet computed the block of some of pages [n]."""
        return bool((self._written[pages] == _PENDING).any())

    def adopt(self, data: int, pages: Int64, keys: UInt64) -> None:
        """Takes over the content of pages [n] (local ids, each once) of ``data``, of which none is
        in use: blocks ``keys`` [n, 2] become cached, without an order of use.
        """
        pages = self._global(data, pages)
        kept = pages[self.announce(np.full(len(pages), data), keys, pages)]
        self._written[kept] = _ADOPTED
        self._untold[kept] = True
        free = self._global(data, self._stack[data, : self._top[data]])
        self._top[data] = 0
        self._push(data, free[~np.isin(free, kept)])
        self._cached[data] += len(kept)

    def take_untold(self, pages: Int64) -> NDArray[np.bool_]:
        """Whether each of pages [n] holds an adopted block that no call has returned yet."""
        untold = self._untold[pages]
        self._untold[pages] = False
        return untold

    def told(self) -> UInt64:
        """Keys [n, 2] of all written blocks but the untold ones; a block on two data indices stands
        there twice.
        """
        pages = np.arange(self.num_data * self._max_pages)
        return self._told(pages[self.index.holds(pages)])

    def shrink(self, data: int, num_pages: int) -> None:
        """The pool of ``data``, of which every page is free, has ``num_pages`` from now on."""
        assert self._top[data] == self.num_pages[data] >= num_pages, f"data {data}: pages are in use"
        self.num_pages[data] = self._top[data] = num_pages
        self._stack[data, :num_pages] = np.arange(num_pages - 1, -1, -1)

    def forget_all(self, data: int) -> None:
        """Drops all blocks of ``data`` from the index."""
        self.forget_unwritten(data, _ADOPTED - 1)

    def forget_unwritten(self, data: int, last_step: int) -> None:
        """Drops blocks from the index that were to be written on ``data`` after ``last_step``, also
        cached ones.
        """
        pages = self._pool(data)
        lost = pages[self.index.holds(pages) & (self._written[pages] > last_step)]
        self._remove(lost)
        self._cached[data] -= int((self._references[lost] == 0).sum())
        self._push(data, lost[self._references[lost] == 0])

    def check(self) -> None:
        """Integrity of pools, counts and index. Raises AssertionError naming what disagrees."""
        self.index.check()
        for data in range(self.num_data):
            pool = self._pool(data)
            free = self._global(data, self._stack[data, : self._top[data]])
            assert len(np.unique(free)) == len(free), f"data {data}: a page is free twice"
            assert (self._references[free] == 0).all(), f"data {data}: a free page is referenced"
            assert not self.index.holds(free).any(), f"data {data}: a free page is in the index"
            idle = np.setdiff1d(pool[self._references[pool] == 0], free)
            assert len(idle) == self._cached[data], (
                f"data {data}: {len(idle)} cached pages, counted {self._cached[data]}"
            )
            assert self.index.holds(idle).all(), f"data {data}: a cached page is not in the index"

    # ----------------------------------------------------------------- inside

    def _first(self, data: int) -> int:
        """The first global page of ``data``."""
        return data * self._max_pages

    def _pool(self, data: int) -> Int64:
        """The global pages of ``data``."""
        return np.arange(self._first(data), self._first(data) + int(self.num_pages[data]))

    def _global(self, data: int | Int64, pages: Int64) -> Int64:
        """Global pages of local ones [n] of ``data``, which is one index or one per page."""
        return data * self._max_pages + pages

    def _bisect(self, hashes: list[bytes], limits: list[int], prompts: Int64, data: Int64) -> Int64:
        """Prefix lengths >= 1 for pairs (prompt, data) whose first block is present."""
        low = np.ones(len(prompts), np.int64)
        high = np.array(limits)[prompts]
        lengths = np.array([len(own) // HASH_BYTES for own in hashes])
        starts = (np.cumsum(lengths) - lengths)[prompts]
        flat = as_keys(b"".join(hashes))
        while (open_ := np.flatnonzero(low < high)).size:
            middle = (low[open_] + high[open_] + 1) // 2
            there = self.index.find(data[open_], flat[starts[open_] + middle - 1]) >= 0
            low[open_[there]] = middle[there]
            high[open_[~there]] = middle[~there] - 1
        return low

    def _settle(self) -> None:
        """Evicts, and takes the pages of the reservations since the last call."""
        self._evict()
        if self._reserved:
            data, start, counts = np.array(self._reserved).T
            self._reserved.clear()
            owners, index = ragged(counts)
            data = data[owners]
            pages = self._global(data, self._stack[data, (start + counts - 1)[owners] - index])
            self._references[pages] = 1
            self._written[pages] = _PENDING
            self._taken.append(pages)

    def _evict_later(self, data: int, lacking: int) -> None:
        """Counts at least ``lacking`` cached pages of ``data``, which must exist, as free.
        ``_evict`` makes them so.
        """
        top = int(self._top[data])
        cached = int(self._cached[data])
        assert cached >= lacking, f"data {data}: {lacking} pages to evict, {cached} cached"
        count = min(cached, max(lacking, int(self.num_pages[data]) // _EVICT_SHARE))
        self._evictions[data] = top, count
        self._top[data] = top + count
        self._cached[data] = cached - count

    def _evict(self) -> None:
        """Frees the least recently used cached pages, as many as are counted as evicted."""
        if not self._evictions:
            return
        gone: list[Int64] = []
        for data, (top, count) in self._evictions.items():
            idle = self.index.evictable(self._references, self._first(data), int(self.num_pages[data]))
            if count < len(idle):
                idle = idle[_oldest(self._stamp[idle], count)]
            self._stack[data, top : top + count] = self.local(idle[::-1])
            gone.append(idle)
        self._evictions.clear()
        self._remove(np.concatenate(gone))

    def _remove(self, pages: Int64) -> None:
        """Drops pages [n] from the index, as far as they are in it."""
        if self._removed is not None:
            keys = self._told(pages[self.index.holds(pages)])
            self._untold[pages] = False
            if len(keys):
                self._removed(keys)
        self.index.remove(pages)

    def _told(self, pages: Int64) -> UInt64:
        """Keys of those of pages [n], all in the index, that are written and not untold."""
        pages = pages[(self._written[pages] != _PENDING) & ~self._untold[pages]]
        return self.index.keys(pages // self._max_pages, pages)

    def _push(self, data: int, pages: Int64) -> None:
        """Frees pages (global ids) of ``data``; the last one is taken first."""
        top = int(self._top[data])
        self._stack[data, top : top + len(pages)] = self.local(pages)
        self._top[data] = top + len(pages)

    def _push_each(self, pages: Int64) -> None:
        """``_push`` for pages whose data indices ascend."""
        data = pages // self._max_pages
        ordinal = np.arange(len(data)) - data.searchsorted(data)
        self._stack[data, self._top[data] + ordinal] = self.local(pages)
        self._top += np.bincount(data, minlength=self.num_data)


def _oldest(stamps: Int64, count: int) -> Int64:
    """Indices of the ``count`` lowest stamps, the first ones of those that are equal, ascending.
    ``argpartition`` alone chooses otherwise on another kind of CPU, where a recording has to replay
    too.
    """
    last = np.partition(stamps, count - 1)[count - 1]
    chosen = stamps <= last
    surplus = np.count_nonzero(chosen) - count
    if surplus:
        chosen[(stamps == last).nonzero()[0][-surplus:]] = False
    indices: Int64 = chosen.nonzero()[0]
    return indices
