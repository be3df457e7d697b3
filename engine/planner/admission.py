"""Admission: chooses which waiting requests get a row, on which data index, with which cached
blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from ..kv.budget import pages_for
from ..protocol.arrays import Int64, as_keys
from ..protocol.message import HASH_BYTES
from .group import Group
from .request import Request, State

_LOOK_AHEAD = 64
_HORIZON = 32
"""Decode steps that a new request is assumed to share, for comparing data indices."""
_PULL = 0.25
"""Share of a prompt's time that a request may lose to join others of its affinity."""


class _Wait(Enum):
    """Reasons why a request gets no row in this round."""

    FOR_ROOM = 1
    FOR_BLOCK = 2


@dataclass(slots=True)
class _Reservation:
    """A row of ``data`` for ``request`` and its global pages: ``num_shared`` from the cache, then
    ``num_fresh`` new ones. ``pages`` lacks these until they are taken.
    """

    request: Request
    data: int
    pages: Int64
    num_shared: int
    num_fresh: int


def _ascending(seconds: NDArray[np.float64]) -> Iterator[int]:
    """Indices of finite values, by value. Sorts only if the caller skips the first index."""
    first = int(seconds.argmin())
    if seconds[first] < np.inf:
        yield first
        order = np.argsort(seconds, kind="stable")
        yield from order[1 : np.count_nonzero(seconds < np.inf)].tolist()


class Admission:
    """Reserves rows and pages for waiting requests and preloads their prompts.

    Requests of a round are placed one by one, since each finds what the ones before it have left.
    Rows, pages and index are updated for all of them together.
    """

    def __init__(self, group: Group) -> None:
        self._group = group

    def reserve(self) -> None:
        """Places as many of the first waiting requests as have room, in order.

        The first that finds no room ends the round, so that none is overtaken for good. A request
        that needs a block which is being computed steps aside until it is there.
        """
        group = self._group
        group.num_deferred = 0
        if not len(group.queue) or not group.num_free_rows():
            return
        candidates = list(islice(group.queue, _LOOK_AHEAD))
        found = self._match(candidates)
        hits = np.count_nonzero(found, axis=1).tolist()
        seconds, token = self._queue_seconds(), group.cost.cost.token
        placed: list[_Reservation] = []
        announced = 0
        prefixes: set[bytes] = set()  # first blocks of those placed
        for request, blocks, hit in zip(candidates, found, hits, strict=True):
            if not group.trials.may_run(request):
                continue
            first = request.hashes_h128[:HASH_BYTES]
            if first in prefixes:  # a request of this round may have announced blocks that this one needs
                self._announce(placed[announced:])
                announced = len(placed)
                blocks, hit = self._match([request])[0], 1
            cost = seconds
            if hit:
                cost = cost - token * group.page_size * blocks
            if request.affinity:
                cost = cost.copy()
                cost[request.affinity % len(cost)] -= _PULL * token * request.num_staged
            place = self._place(request, blocks, cost)
            if place is _Wait.FOR_ROOM:
                break
            if place is _Wait.FOR_BLOCK:
                group.num_deferred += 1
                continue
            placed.append(place)
            if first:
                prefixes.add(first)
            more = group.rows.num_free(place.data) > 0
            seconds[place.data] += self._added_seconds(place) if more else np.inf
        self._announce(placed[announced:])
        self._occupy(placed)

    def _match(self, requests: list[Request]) -> Int64:
        """Cached leading blocks [request, data]."""
        limits = [self._limit(request) for request in requests]
        return self._group.kv.match([request.hashes_h128 for request in requests], limits)

    def _limit(self, request: Request) -> int:
        """The most blocks that may come from the cache."""
        return min(request.num_hashes, request.num_skippable // self._group.page_size)

    def _queue_seconds(self) -> NDArray[np.float64]:
        """Predicted seconds [D] that a new request would wait for and share; infinity where no row
        is free.
        """
        group, rows = self._group, self._group.rows
        waiting = ((rows.state >= State.PRELOADING) & (rows.state <= State.PREFILL)).nonzero()[0]
        left = (rows.prompt[waiting] - rows.sent[waiting]).astype(np.float64)
        backlog = np.bincount(rows.data(waiting), weights=left, minlength=rows.num_data).astype(np.float64)
        running = group.num_running()
        seconds = group.cost.queue_seconds(backlog, running, group.kv.used() * group.page_size, _HORIZON)
        seconds[~group.steps.alive | (running >= rows.num_slots)] = np.inf
        return seconds

    def _added_seconds(self, place: _Reservation) -> float:
        """Predicted seconds that a request just placed adds for the next one on its data index."""
        cost, request = self._group.cost.cost, place.request
        computed = request.num_staged - place.num_shared * self._group.page_size
        return cost.token * computed + _HORIZON * (cost.token + cost.kv * request.num_staged)

    def _place(self, request: Request, blocks: Int64, seconds: NDArray[np.float64]) -> _Reservation | _Wait:
        """Takes a row and pages on the data index with the least ``seconds`` [D] that has room."""
        group, kv = self._group, self._group.kv
        for data in _ascending(seconds):
            shared = kv.prefix(data, request.hashes_h128, int(blocks[data]))
            if len(shared) and kv.is_pending(shared):
                return _Wait.FOR_BLOCK
            fresh = pages_for(request.num_staged, group.page_size) - len(shared)
            if not group.has_headroom(data, fresh):
                continue
            if kv.reserve(data, shared, fresh):
                group.rows.claim(data, request)
                return _Reservation(request, data, shared, len(shared), fresh)
        return _Wait.FOR_ROOM

    def _take_pages(self, placed: list[_Reservation]) -> None:
        """Gives reservations their new pages."""
        fresh, start = self._group.kv.take_reserved(), 0
        for place in placed:
            own = fresh[start : start + place.num_fresh]
            place.pages = np.concatenate([place.pages, own]) if place.num_shared else own
            start += place.num_fresh

    def _announce(self, placed: list[_Reservation]) -> None:
        """Enters the fresh blocks of requests into the index, as pending."""
        self._take_pages(placed)
        hashes = [place.request.hashes_h128[HASH_BYTES * place.num_shared :] for place in placed]
        if any(hashes):
            counts = [len(own) // HASH_BYTES for own in hashes]
            pages = [
                place.pages[place.num_shared : place.num_shared + count]
                for place, count in zip(placed, counts, strict=True)
            ]
            data = np.repeat([place.data for place in placed], counts)
            self._group.kv.announce(data, as_keys(b"".join(hashes)), np.concatenate(pages))

    def _occupy(self, placed: list[_Reservation]) -> None:
        """Fills the rows of requests and preloads their prompts."""
        group = self._group
        if not placed:
            return
        requests = [place.request for place in placed]
        cached = [place.num_shared * group.page_size for place in placed]
        pages = np.concatenate([place.pages for place in placed])
        counts = np.array([len(place.pages) for place in placed])
        group.rows.occupy(requests, cached, counts, pages, group.kv.local(pages))
        group.queue.take(requests)
        if group.changes is not None:
            self._tell_adopted(placed)
        for place, num_cached in zip(placed, cached, strict=True):
            request = place.request
            group.preloads.send(request, place.data)
            if not request.started:
                num_prompt = request.num_prompt
                group.counters.prefix_queries += num_prompt
                # One that goes on after a restart of its frontend may find its output cached, too.
                group.counters.prefix_hits += min(num_cached, num_prompt)

    def _tell_adopted(self, placed: list[_Reservation]) -> None:
        """Publishes blocks of an earlier controller once a request brings their tokens."""
        group = self._group
        assert group.changes is not None
        for place in placed:
            blocks = group.kv.take_untold(place.pages[: place.num_shared]).nonzero()[0]
            if blocks.size:
                group.changes.stored([place.request], np.zeros_like(blocks), blocks)
