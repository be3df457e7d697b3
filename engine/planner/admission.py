"""Admission: which waiting request gets a row, where, and which of its blocks it need not
compute.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from ..kv.budget import pages_for
from ..kv.manager import PENDING
from ..protocol.arrays import Int64, as_keys
from ..protocol.message import HASH_BYTES
from .group import Group
from .request import Request, State

_LOOK_AHEAD = 64
_HORIZON = 32
"""Decode steps a new request is assumed to share with its neighbours when data indices are compared."""

_WAITS = -2
_NO_ROOM = -1


@dataclass(slots=True)
class _Place:
    """What one request got: a row of ``data`` and its pages (global), the first ``num_shared`` of
    them from the cache.
    """

    request: Request
    data: int
    pages: Int64
    num_shared: int


def _ascending(seconds: NDArray[np.float64]) -> Iterator[int]:
    """Indices by value; the whole order is made only when the first does not do."""
    yield int(seconds.argmin())
    yield from np.argsort(seconds, kind="stable").tolist()[1:]


class Admission:
    """Reserves rows and pages for waiting requests and stages their prompts.

    Requests of a round are placed one by one, since each finds what the ones before it have left;
    what that means for rows, pages and index is entered for all of them together.
    """

    def __init__(self, group: Group) -> None:
        self._group = group

    def reserve(self) -> None:
        """Places as many of the first waiting requests as have room, in order.

        The first that finds no room ends the round, so nobody is overtaken for good; one that needs
        a block which is being computed steps aside until it is there. Prompts to stage are left in
        ``group.staging``.
        """
        group = self._group
        if not len(group.queue) or not group.num_free_rows():
            return
        candidates = list(islice(group.queue, _LOOK_AHEAD))
        found = group.kv.match(
            [request.hashes_h128 for request in candidates], [self._limit(request) for request in candidates]
        )
        hits = np.count_nonzero(found, axis=1).tolist()
        seconds, cost = self._queue_seconds(), group.cost.cost
        placed: list[_Place] = []
        announced = 0
        prefixes: set[bytes] = set()  # first blocks of those placed
        for request, blocks, hit in zip(candidates, found, hits, strict=True):
            first = request.hashes_h128[:HASH_BYTES]
            if first in prefixes:  # one placed in this round may have announced blocks that this one needs
                self._announce(placed[announced:])
                announced = len(placed)
                blocks = group.kv.match([request.hashes_h128], [self._limit(request)])[0]
                hit = 1
            place = self._place(
                request, blocks, seconds - cost.token * group.page_size * blocks if hit else seconds
            )
            if place == _NO_ROOM:
                break
            if isinstance(place, int):
                continue
            placed.append(place)
            if first:
                prefixes.add(first)
            computed = request.num_staged - place.num_shared * group.page_size
            seconds[place.data] += cost.token * computed + _HORIZON * (
                cost.token + cost.kv * request.num_staged
            )
        self._announce(placed[announced:])
        self._settle_in(placed)

    def _limit(self, request: Request) -> int:
        """Blocks that may come from the cache."""
        return min(request.num_hashes, request.num_skippable // self._group.page_size)

    def _queue_seconds(self) -> NDArray[np.float64]:
        """Predicted seconds [D] that a new request would wait for and share."""
        group, rows = self._group, self._group.rows
        waiting = ((rows.state >= State.PRELOADING) & (rows.state <= State.PREFILL)).nonzero()[0]
        left = (rows.prompt[waiting] - rows.sent[waiting]).astype(np.float64)
        backlog = np.bincount(rows.data(waiting), weights=left, minlength=rows.num_data).astype(np.float64)
        return group.cost.queue_seconds(
            backlog, group.num_running(), group.kv.used() * group.page_size, _HORIZON
        )

    def _place(self, request: Request, blocks: Int64, seconds: NDArray[np.float64]) -> _Place | int:
        """Where the request goes, with a row and pages taken for it; or _NO_ROOM, or _WAITS."""
        group = self._group
        for data in _ascending(seconds):
            if not group.steps.alive[data] or not group.rows.num_free(data):
                continue
            shared = group.kv.prefix(data, request.hashes_h128, int(blocks[data]))
            if len(shared) and (group.kv.written[shared] == PENDING).any():
                return _WAITS
            fresh = pages_for(request.num_staged, group.page_size) - len(shared)
            if not group.has_headroom(data, fresh):
                continue
            pages = group.kv.reserve(data, shared, fresh)
            if pages is not None:
                group.rows.claim(data, request)
                return _Place(request, data, pages, len(shared))
        return _NO_ROOM

    def _announce(self, placed: list[_Place]) -> None:
        """Enters the fresh blocks of requests into the index, as pending."""
        hashes = [place.request.hashes_h128[HASH_BYTES * place.num_shared :] for place in placed]
        if any(hashes):
            counts = [len(own) // HASH_BYTES for own in hashes]
            pages = [
                place.pages[place.num_shared : place.num_shared + count]
                for place, count in zip(placed, counts, strict=True)
            ]
            data = np.repeat([place.data for place in placed], counts)
            self._group.kv.announce(data, as_keys(b"".join(hashes)), np.concatenate(pages))

    def _settle_in(self, placed: list[_Place]) -> None:
        """Fills the rows of requests and leaves their prompts to be staged."""
        group = self._group
        if not placed:
            return
        requests = [place.request for place in placed]
        cached = [place.num_shared * group.page_size for place in placed]
        pages = np.concatenate([place.pages for place in placed])
        counts = np.array([len(place.pages) for place in placed])
        group.rows.occupy(requests, cached, counts, pages, group.kv.local(pages))
        group.queue.take(requests)
        for place, num_cached in zip(placed, cached, strict=True):
            group.preloads.send(place.request, place.data)
            if not place.request.started:
                group.counters.prefix_queries += place.request.num_prompt
                group.counters.prefix_hits += num_cached
