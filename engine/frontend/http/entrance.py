"""Counts the connections of a frontend, and closes idle ones in favour of new ones if there are too
many.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any, Protocol

from starlette.types import ASGIApp

from ...protocol.specs import FrontendLimits
from ..api.errors import ApiError, error_response
from ..dialects.messages_errors import messages_error_response, speaks_messages
from ..reply import Receive
from .asgi_writer import Send

RETRY_CROWDED = 1.0
MAX_TURNED_AWAY = 64  # connections beyond the limit, which are answered 503
STATUS_PATHS = frozenset({"/health", "/ping", "/ready", "/metrics"})


class Evictable(Protocol):
    def evict(self) -> None:
        """Closes the connection, which waits for its client."""


class Entrance:
    """At most ``max_connections`` are served at once. Where there are more, the one that has waited
    longest for its client (for a request, or for the rest of one) is closed; if none waits, the new
    one is answered 503, except for requests for the server's health.
    """

    def __init__(self, limits: FrontendLimits) -> None:
        self.limits = limits
        self._served: set[Evictable] = set()
        self._waiting: dict[Evictable, None] = {}  # those served that wait for their client, longest first
        self._turned_away: dict[Evictable, None] = {}

    def enter(self, connection: Evictable) -> bool:
        """A new connection, which waits for its client. Returns whether it is served."""
        if len(self._served) >= self.limits.max_connections:
            if not self._waiting:
                self._turned_away[connection] = None
                if len(self._turned_away) > MAX_TURNED_AWAY:
                    _evict_first(self._turned_away)
                return False
            self._served.discard(_evict_first(self._waiting))
        self._served.add(connection)
        self._waiting[connection] = None
        return True

    def leave(self, connection: Evictable) -> None:
        for group in (self._waiting, self._turned_away):
            group.pop(connection, None)
        self._served.discard(connection)

    def waits(self, connection: Evictable) -> None:
        """Notes that ``connection`` waits for its client."""
        if connection in self._served:
            self._waiting[connection] = None

    def works(self, connection: Evictable) -> None:
        """Notes that a complete request of ``connection`` is being answered."""
        self._waiting.pop(connection, None)

    def crowded(self, app: ASGIApp) -> ASGIApp:
        """The application of a connection for which there is no room."""

        async def answer(scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
            if scope["path"] in STATUS_PATHS:
                await app(scope, receive, send)
                return
            most = self.limits.max_connections
            text = f"The server has {most} connections, as many as frontend.max_connections allows"
            error = ApiError(503, text, retry_after=RETRY_CROWDED)
            messages = speaks_messages(scope["path"])
            response = messages_error_response(error, "") if messages else error_response(error)
            response.headers["connection"] = "close"
            await response(scope, receive, send)

        return answer


def _evict_first(group: dict[Evictable, None]) -> Evictable:
    first = next(iter(group))
    del group[first]
    first.evict()
    return first
