"""Request bodies: read within limits, then parsed and validated.

The parsing thread holds the interpreter lock while it parses; ``check_outline`` bounds for how
long.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, Protocol, TypeVar

from pydantic import ValidationError
from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request

from ..api.errors import CLIENT_GONE, ApiError, bad_request, from_validation
from ..api.outline import PLAIN_BYTES, check_outline

RETRY_FULL = 1.0
_BOM = b"\xef\xbb\xbf"

T = TypeVar("T")
Made_co = TypeVar("Made_co", covariant=True)


class Adapter(Protocol[Made_co]):
    """Makes what a route takes from a JSON document; a TypeAdapter is one."""

    def validate_python(self, document: Any, /) -> Made_co:
        """Raises ValidationError or ApiError."""


class Bodies:
    """The bodies that one frontend holds: each of at most ``largest`` bytes, and together at most
    ``memory``, beside those of up to ``PLAIN_BYTES``, which are always read.
    """

    def __init__(self, largest: int, memory: int) -> None:
        self._largest = largest
        self._memory = memory
        self._held = 0
        self._thread = ThreadPoolExecutor(1, "parse")
        self._turn = asyncio.Lock()  # the loop turns between two bodies: each may hold it up once

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """The whole body, which counts as held until the block ends. Raises ApiError: 413 as soon
        as its size exceeds the limit, 415 for compressed ones, 503 where memory is short.
        """
        self._check_head(request)
        parts: list[bytes] = []
        size = 0
        try:
            async for part in request.stream():
                size += len(part)
                self._held += len(part)
                if size > self._largest:
                    raise self._too_large()
                if self._held > self._memory and size > PLAIN_BYTES:
                    raise ApiError(503, self._full(), retry_after=RETRY_FULL)
                parts.append(part)
            yield b"".join(parts)
        except ClientDisconnect:
            raise ApiError(CLIENT_GONE, "The client went away before its request was complete") from None
        finally:
            self._held -= size

    @asynccontextmanager
    async def parsed(self, request: Request, adapter: Adapter[T]) -> AsyncIterator[T]:
        """The validated body. Large ones are parsed in a thread, one at a time. Raises ApiError."""
        async with self.read(request) as body:
            if len(body) <= PLAIN_BYTES:
                yield parse(body, adapter)
            else:
                loop = asyncio.get_running_loop()
                async with self._turn:
                    ask = await loop.run_in_executor(self._thread, parse, body, adapter)
                yield ask

    def _full(self) -> str:
        return (
            f"The server holds {self._held} bytes of request bodies, and frontend.body_memory is"
            f" {self._memory}: send large requests again later"
        )

    def _check_head(self, request: Request) -> None:
        """Refuses a body by what the head says of it."""
        coding = request.headers.get("content-encoding", "identity").strip().lower()
        if coding not in ("", "identity"):
            text = f"Content-Encoding: {coding[:80]!r} is not supported: send the body uncompressed"
            raise ApiError(415, text, headers={"Accept-Encoding": "identity"})
        declared = request.headers.get("content-length", "")
        if declared.isdigit() and int(declared) > self._largest:
            raise self._too_large()

    def _too_large(self) -> ApiError:
        return ApiError(413, f"The body is larger than {self._largest} bytes (frontend.max_body)")


def parse(body: bytes, adapter: Adapter[T]) -> T:
    """Raises ApiError 400 for a body that is not JSON or not what ``adapter`` takes."""
    check_outline(body, "The body")
    try:
        document = from_json(body.removeprefix(_BOM), allow_inf_nan=False)
    except ValueError as error:
        raise bad_request(f"The body is not valid JSON: {error}") from None
    try:
        return adapter.validate_python(document)
    except ValidationError as error:
        raise from_validation(error) from None
