"""The outermost ASGI layer: API keys, request ids, HTTP metrics, and the log of failures."""

from __future__ import annotations

import hmac
import logging
import re
import secrets
import time
from collections.abc import MutableMapping
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp

from ..api.errors import ApiError, error_response
from ..metrics.metrics import Metrics
from ..reply import Receive
from .asgi_writer import Send
from .streams import SEND_KEY

ID_KEY = "lockstep.request_id"
OPEN_PATHS = frozenset({"/health", "/ready", "/version", "/metrics", "/load"})
_VALID_ID = re.compile(r"[\x21-\x7e]{1,128}")
_log = logging.getLogger("lockstep.frontend")


class AccessMiddleware:
    """Wraps the application. Without ``api_keys`` everybody may use it; admin paths always need the
    admin key.
    """

    def __init__(
        self, app: ASGIApp, api_keys: tuple[str, ...], admin_key: str | None, metrics: Metrics
    ) -> None:
        self._app = app
        self._api_keys = api_keys
        self._admin_key = admin_key
        self._metrics = metrics

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.monotonic()
        headers = Headers(scope=scope)
        request_id = _request_id(headers.get("x-request-id"))
        scope[ID_KEY] = request_id
        scope[SEND_KEY] = send  # streams write past the layers in between, which do nothing to chunks
        status = 0

        async def send_with_id(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            error = self._refusal(scope["path"], headers.get("authorization", ""))
            if error is not None:
                await error_response(error)(scope, receive, send_with_id)
            else:
                await self._app(scope, receive, send_with_id)
        except Exception:  # the application has answered 500, unless it failed in mid-stream
            _log.exception("request %s failed", request_id)
            if status < 500:
                raise
        finally:
            path = getattr(scope.get("route"), "path", "none")
            self._metrics.http(path, scope["method"], status or 499, time.monotonic() - began)

    def _refusal(self, path: str, authorization: str) -> ApiError | None:
        if path.startswith("/admin"):
            if self._admin_key is None:
                return ApiError(401, "Admin endpoints need an admin key, and none is configured")
            keys: tuple[str, ...] = (self._admin_key,)
        elif path in OPEN_PATHS or not self._api_keys:
            return None
        else:
            keys = self._api_keys
        scheme, _, given = authorization.partition(" ")
        # all keys are compared, each in constant time
        matches = [hmac.compare_digest(given.strip().encode(), key.encode()) for key in keys]
        if scheme.lower() == "bearer" and any(matches):
            return None
        return ApiError(401, "A valid API key is needed: Authorization: Bearer <key>")


def _request_id(given: str | None) -> str:
    """The client's id if it is a valid header value, else a random one."""
    return given if given is not None and _VALID_ID.fullmatch(given) else secrets.token_hex(16)
