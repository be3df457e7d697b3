"""Checks API keys."""

from __future__ import annotations

import hmac
from collections.abc import MutableMapping
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp

from ..api.errors import ApiError
from ..reply import Receive
from .asgi_writer import Send
from .request_log import refuse

OPEN_PATHS = frozenset(
    {"/health", "/ready", "/ping", "/version", "/metrics", "/load", "/docs", "/openapi.json", "/admin"}
)


class KeyMiddleware:
    """Admits requests with a valid key. Without ``api_keys`` everybody may use the server; admin
    paths always need the admin key, ``OPEN_PATHS`` never need one, so /admin itself, a page
    without data, does not. A key comes as a bearer token,
    or else in ``X-API-Key``.
    """

    def __init__(self, app: ASGIApp, api_keys: tuple[str, ...], admin_key: str | None) -> None:
        self._app = app
        self._api_keys = api_keys
        self._admin_key = admin_key

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        error = self._refusal(scope["path"], Headers(scope=scope))
        app = self._app if error is None else refuse(scope, error)
        await app(scope, receive, send)

    def _refusal(self, path: str, headers: Headers) -> ApiError | None:
        if path in OPEN_PATHS:
            return None
        if path.startswith("/admin"):
            if self._admin_key is None:
                text = "Admin endpoints need an admin key, and none is configured"
                return _unauthorized(text, "frontend.admin_key")
            keys: tuple[str, ...] = (self._admin_key,)
        elif not self._api_keys:
            return None
        else:
            keys = self._api_keys
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            given = headers.get("x-api-key", "")
        # all keys are compared, each in constant time
        matches = [hmac.compare_digest(given.strip().encode(), key.encode()) for key in keys]
        if any(matches):
            return None
        return _unauthorized("A valid API key is needed: Authorization: Bearer <key>, or X-API-Key: <key>")


def _unauthorized(text: str, param: str | None = None) -> ApiError:
    return ApiError(401, text, param, headers={"WWW-Authenticate": "Bearer"})
