"""The requests that wait for a row."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from .request import Request


class WaitingQueue:
    """Requests without a row, by priority (lower first), then by arrival: preempted ones come
    before new ones.
    """

    def __init__(self) -> None:
        self._levels: dict[int, deque[Request]] = {}
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Request]:
        for priority in sorted(self._levels):
            yield from self._levels[priority]

    def add(self, request: Request) -> None:
        """Appends a new request."""
        self._levels.setdefault(request.priority, deque()).append(request)
        self._size += 1

    def put_back(self, request: Request) -> None:
        """Inserts a request that has run before, ahead of those that arrived later."""
        level = self._levels.setdefault(request.priority, deque())
        index = 0
        for index, other in enumerate(level):  # noqa: B007 - the index outlives the loop
            if other.order > request.order:
                break
        else:
            index = len(level)
        level.insert(index, request)
        self._size += 1

    def take(self, requests: list[Request]) -> None:
        """Removes requests that have been given a row (they are near the front)."""
        leaving = {id(request) for request in requests}
        for level in self._levels.values():
            kept: list[Request] = []
            while level and leaving:
                request = level.popleft()
                if id(request) in leaving:
                    leaving.discard(id(request))
                else:
                    kept.append(request)
            level.extendleft(reversed(kept))
        self._size -= len(requests)

    def drop(self, request: Request) -> None:
        """Removes a waiting request that will never run."""
        self._levels[request.priority].remove(request)
        self._size -= 1
