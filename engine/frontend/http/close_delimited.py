"""Answers to HTTP/1.0 clients, which know no chunks (RFC 9112 section 6.1): a body of unknown
length ends with the connection.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from ..reply import Receive
from .asgi_writer import Send


def close_delimited(app: ASGIApp, cycle: RequestResponseCycle) -> ASGIApp:
    """``app`` for a request whose ``cycle`` closes the connection after the answer."""

    async def answer(scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        bounded = False

        async def send_plain(message: MutableMapping[str, Any]) -> None:
            nonlocal bounded
            if message["type"] == "http.response.start":
                bounded = any(name.lower() == b"content-length" for name, _ in message.get("headers", ()))
                if not bounded:
                    cycle.chunked_encoding = False  # undecided, it would become true
            elif not bounded:
                cycle.expected_content_length = len(message.get("body", b""))  # checked by each write
            await send(message)

        await app(scope, receive, send_plain)

    return answer
