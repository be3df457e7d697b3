"""Pages for the rows that decode, taken from other requests where a pool is exhausted."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .group import Group
from .packing import SectionBytes, pack, pairs
from .request import State


class Growth:
    """Lets decoding rows grow."""

    def __init__(self, group: Group) -> None:
        self._group = group

    def grow(self, cohort: int, decoding: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], SectionBytes]:
        """Gives every row of ``decoding`` [rows] the pages for the longest it may become. Returns
        the rows that still decode, and (slot, page) of those that grow.

        ``limit`` caps this: a row that may be at its limit still computes a position.
        """
        group, rows = self._group, self._group.rows
        while True:
            longest = np.minimum(rows.high + group.spec.max_advance, rows.limit)
            growing = ((longest > rows.num_pages * group.page_size) & decoding).nonzero()[0]
            if not len(growing):
                return decoding, {}
            data = rows.data(growing)
            short = group.kv.short_of(np.bincount(data, minlength=rows.num_data))
            if not short.size:
                break
            for index in short.tolist():
                self._give_way(index)
            decoding = rows.decoding(cohort)
        pages = group.kv.take_each(data)
        local = group.kv.local(pages)
        rows.append_pages(growing, pages, local)
        return decoding, pack(data, pairs(rows.slot(growing), local), rows.num_data)

    def _give_way(self, data: int) -> None:
        """Frees pages of ``data``: those of rows on their way out, or else the youngest request's,
        which will run again.
        """
        group, rows = self._group, self._group.rows
        mine = np.array(rows.of_data(data))
        leaving = mine[(rows.state[mine] == State.DRAINING) & (rows.num_pages[mine] > 0)]
        if leaving.size:
            for row in leaving.tolist():
                group.give_back_pages(np.array([row]))
            return
        mine = mine[(rows.state[mine] >= State.PRELOADING) & (rows.state[mine] <= State.DECODE)]
        assert len(mine) > 1, f"data {data}: a single request does not fit the pool"
        group.preempt(int(mine[np.argmax(rows.order[mine])]))
