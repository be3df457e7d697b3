"""Detects requests that kill a rank on every replay.

One death says little about the many requests of its section. A request that was in two of them and
got no token in between is a suspect. From then on suspects run one at a time beside the others: a
token clears a suspect, another death finds it guilty.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .request import Request


@dataclass(slots=True)
class _Record:
    """The deaths of a request that has had ``tokens`` tokens at each of them."""

    deaths: int
    tokens: int


class Trials:
    """Counts deaths by request. ``tokens`` tells how many tokens a request has by now."""

    def __init__(self, tokens: Callable[[Request], int]) -> None:
        self._tokens = tokens
        self._records: dict[Request, _Record] = {}
        self._running: Request | None = None

    def died(self, requests: Iterable[Request]) -> Request | None:
        """Books the death of a rank with these requests in its unfinished steps. Returns the guilty
        one if there is only one suspect among them.
        """
        suspects = []
        for request in requests:
            record = self._records.get(request)
            tokens = self._tokens(request)
            if record is None or record.tokens != tokens:
                record = self._records[request] = _Record(0, tokens)
            record.deaths += 1
            if record.deaths > 1:
                suspects.append(request)
        self._running = None
        return suspects[0] if len(suspects) == 1 else None

    def may_run(self, request: Request) -> bool:
        """Whether ``request`` may be given a row now. A suspect waits for the one before it."""
        if not self._records or not self._suspected(request):
            return True
        running = self._running
        if running is not None and running.row >= 0 and self._suspected(running):
            return False
        self._running = request
        return True

    def ended(self, request: Request) -> None:
        self._records.pop(request, None)

    def _suspected(self, request: Request) -> bool:
        record = self._records.get(request)
        if record is not None and record.tokens != self._tokens(request):
            del self._records[request]
            return False
        return record is not None and record.deaths > 1
