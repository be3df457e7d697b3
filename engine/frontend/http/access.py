"""The outermost ASGI layer: request ids, HTTP metrics, the line of a request in the log, and the
forms of a request that mean the same: HEAD for GET, a slash at the end of a path.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import MutableMapping
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp

from ..metrics.metrics import Metrics
from ..reply import Receive
from .asgi_writer import Send
from .observers import Observers
from .request_log import RECORD_KEY, RequestRecord
from .stories import Stories
from .streams import SEND_KEY

ID_KEY = "lockstep.request_id"
_VALID_ID = re.compile(r"[\x21-\x7e]{1,128}")
_log = logging.getLogger("lockstep.frontend")


class AccessMiddleware:
    """Wraps the application and all other layers. ``log_requests``: logs a line for each request;
    ``observers`` are notified of each, None if there are none.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        stories: Stories,
        log_requests: bool,
        observers: Observers | None = None,
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._stories = stories
        self._log_requests = log_requests
        self._observers = observers

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        method: str = scope["method"]
        request_id = _request_id(Headers(scope=scope).get("x-request-id"))
        record = RequestRecord(request_id, method, scope.get("raw_path") or b"", time.monotonic())
        # The server knows the original: it drops the body of an answer to HEAD.
        scope = {**scope, "method": "GET" if method == "HEAD" else method, "path": _path(scope["path"])}
        scope[ID_KEY] = request_id
        scope[RECORD_KEY] = record
        self._stories.begin(record)
        observed = None if self._observers is None else self._observers.begin(record, scope["headers"])
        scope[SEND_KEY] = send  # streams write past the layers in between, which do nothing to chunks

        async def send_with_id(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
                if observed is not None and observed.traceparent:
                    message["headers"].append((b"traceparent", observed.traceparent))
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:  # the application has answered 500, unless it failed in mid-stream
            _log.exception("request %s failed", request_id)
            if record.status < 500:
                raise
        finally:
            route = getattr(scope.get("route"), "path", "none")
            self._metrics.http(route, method, record.status or 499, time.monotonic() - record.began)
            self._stories.end(record)
            for choices in () if record.reply is None else record.reply.choices():
                self._metrics.answered(choices)
            if self._log_requests:
                record.log()
            if self._observers is not None and observed is not None:
                self._observers.end(observed, route)


def _path(path: str) -> str:
    """The path without slashes at its end: a redirect would lose the body or the key."""
    return path.rstrip("/") or "/"


def _request_id(given: str | None) -> str:
    """The client's id if it is a valid header value, else a random one."""
    return given if given is not None and _VALID_ID.fullmatch(given) else secrets.token_hex(16)
