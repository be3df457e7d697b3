"""A server at a URL, asked over HTTP: one connection per request, without retries."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httptools
import msgspec

_READ = 1 << 16
URL_AND_KEY = "--against", "--api-key-env"
_SHOWN = 300  # characters of an error that is no JSON


class AddressError(ValueError):
    """A URL that cannot be used."""


class ServerError(Exception):
    """A missing or unusable answer. ``kind``: a short label for counting such errors.

    ``status``: of HTTP; 0 without one.
    """

    def __init__(self, kind: str, problem: str, status: int = 0) -> None:
        super().__init__(problem)
        self.kind = kind
        self.status = status

    @property
    def asked_wrongly(self) -> bool:
        """Whether the server is there and refuses the key, the model or the request."""
        return 400 <= self.status < 500 and self.status not in (408, 429)


@dataclass(frozen=True)
class Server:
    """``prefix``: path before ``/v1``. ``seconds``: longest wait for a connection or for the next
    bytes of an answer. ``tls``: None for plain HTTP. ``key_option`` names the variable with the
    key.
    """

    host: str
    port: int
    tls: ssl.SSLContext | None
    prefix: str
    seconds: float
    api_key: str | None = None
    key_option: str = "--api-key-env"

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}{self.prefix}"

    def head(self, method: str, path: str, length: int) -> bytes:
        """Request line and headers."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        lines = [
            f"{method} {self.prefix}{path} HTTP/1.1",
            f"Host: {host}:{self.port}",
            "Connection: close",
            "Accept-Encoding: identity",
            f"Content-Length: {length}",
            "Content-Type: application/json",
        ]
        if self.api_key is not None:
            lines.append(f"Authorization: Bearer {self.api_key}")
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def server_at(
    url: str, seconds: float, api_key: str | None = None, options: tuple[str, str] = URL_AND_KEY
) -> Server:
    """The server at ``url``, with or without ``/v1``. ``options``: those that name the URL and the
    variable with the key. Raises AddressError.
    """
    url_option, key_option = options
    allowed = "should be http://HOST[:PORT] or https://HOST[:PORT]"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise AddressError(f"{url_option} {url}: {error}; {allowed}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise AddressError(f"{url_option} {url}: {allowed}")
    if parts.username is not None or parts.query or parts.fragment or not url.isascii() or " " in url:
        raise AddressError(f"{url_option} {url}: has more than host, port and path; {allowed}")
    if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
        raise AddressError(f"{key_option}: the key holds characters that no header can; should be ASCII")
    tls = ssl.create_default_context() if parts.scheme == "https" else None
    prefix = parts.path.rstrip("/").removesuffix("/v1")
    return Server(parts.hostname, port or (443 if tls else 80), tls, prefix, seconds, api_key, key_option)


class _Parsed:
    """Takes in what httptools finds."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.begun = self.ended = False

    def on_headers_complete(self) -> None:
        self.begun = True

    def on_body(self, part: bytes) -> None:
        self.parts.append(part)

    def on_message_complete(self) -> None:
        self.ended = True


class ServerAnswer:
    """An answer whose status is known and whose body is read as it comes."""

    def __init__(self, server: Server, asked: str, reader: asyncio.StreamReader) -> None:
        self._server, self._asked, self._reader = server, asked, reader
        self._parsed = _Parsed()
        self._parser = httptools.HttpResponseParser(self._parsed)

    async def begin(self) -> int:
        """Reads up to the end of the headers; returns the status."""
        while not self._parsed.begun:
            await self._read("the answer to")
        return int(self._parser.get_status_code())

    async def parts(self) -> AsyncIterator[bytes]:
        """The body, in pieces of any size."""
        while True:
            parts, self._parsed.parts = self._parsed.parts, []
            for part in parts:
                yield part
            if self._parsed.ended:
                return
            await self._read("the rest of the answer to")

    async def whole(self) -> bytes:
        return b"".join([part async for part in self.parts()])

    async def _read(self, awaited: str) -> None:
        server = self._server
        try:
            async with asyncio.timeout(server.seconds):
                data = await self._reader.read(_READ)
        except TimeoutError:
            problem = (
                f"{server.url} sent nothing for {server.seconds:g} s; waited for {awaited} {self._asked}"
            )
            raise ServerError("silent", problem) from None
        except OSError as error:
            raise self._cut(_cause(error)) from None
        if not data:
            raise self._cut("the server closed the connection")
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            problem = f"{server.url} does not speak HTTP: {type(error).__name__}"
            raise ServerError("not HTTP", problem) from None

    def _cut(self, cause: str) -> ServerError:
        return ServerError("cut off", f"{self._server.url}: {cause} during {self._asked}")


@asynccontextmanager
async def ask(server: Server, method: str, path: str, body: Any = None) -> AsyncIterator[ServerAnswer]:
    """Sends a request; yields its answer of status 200. Raises ServerError."""
    content = b"" if body is None else msgspec.json.encode(body)
    asked = f"{method} {path}"
    writer = None
    try:
        try:
            async with asyncio.timeout(server.seconds):
                reader, writer = await asyncio.open_connection(server.host, server.port, ssl=server.tls)
                writer.write(server.head(method, path, len(content)) + content)
                await writer.drain()
        except TimeoutError:
            problem = f"{server.url}: no connection for {asked} within {server.seconds:g} s"
            raise ServerError("no connection", problem) from None
        except (OSError, UnicodeError) as error:  # the latter by names that no DNS can have
            raise ServerError("no connection", f"{server.url}: {_cause(error)} ({asked})") from None
        answer = ServerAnswer(server, asked, reader)
        if (status := await answer.begin()) != 200:
            message = error_message(await answer.whole())
            if status in (401, 403):
                message += f" ({server.key_option} names the variable with the key)"
            raise ServerError(f"HTTP {status}", f"{server.url}: {asked}: HTTP {status}: {message}", status)
        yield answer
    finally:
        if writer is not None:
            writer.close()
            with contextlib.suppress(OSError):
                writer.transport.abort()  # a cut stream must not linger


async def ask_json(server: Server, method: str, path: str, body: Any = None) -> Any:
    """The answer as a JSON document. Raises ServerError."""
    async with ask(server, method, path, body) as answer:
        content = await answer.whole()
    try:
        return msgspec.json.decode(content)
    except msgspec.DecodeError:
        problem = f"{server.url}: the answer to {method} {path} is not JSON: {content[:80]!r}"
        raise ServerError("not JSON", problem) from None


async def served_model(server: Server, wanted: str | None) -> Mapping[str, Any]:
    """The entry of ``/v1/models`` for a model; the first entry unless one is ``wanted``."""
    listed = await ask_json(server, "GET", "/v1/models")
    try:
        models = {str(entry["id"]): entry for entry in listed["data"]}
    except (TypeError, KeyError):
        raise ServerError("not a list", f"{server.url}: /v1/models lists no models") from None
    name = wanted if wanted is not None else next(iter(models), None)
    if name not in models:
        names = ", ".join(models) or "none"
        raise ServerError("no model", f"--model {name}: {server.url} serves {names}", 404)
    entry: Mapping[str, Any] = models[name]
    return entry


def error_message(body: bytes) -> str:
    """The message of an error in the dialect of OpenAI, else the start of the text."""
    try:
        return str(msgspec.json.decode(body)["error"]["message"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return body.decode(errors="replace")[:_SHOWN]


def _cause(error: OSError | UnicodeError) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
