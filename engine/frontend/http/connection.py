"""A client's connection: uvicorn's HTTP/1 protocol within limits on size, time and pieces.

Bytes reach the parser in slices, and only while no earlier request of the connection waits for its
answer, so that a turn of the event loop stays short whatever a client sends. Heads, trailers and
the framing of chunks are counted, because the parser joins what it has of a header with each new
piece of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from enum import Enum, auto
from http import HTTPStatus

import httptools
from starlette.types import ASGIApp
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from ..api.errors import ApiError, error_body
from .close_delimited import close_delimited
from .entrance import Entrance

MAX_HEAD_BYTES = 65536
SLICE_BYTES = 16384
FREE_PIECES = 16384  # pieces of a body, beyond which their mean size counts
MIN_PIECE_BYTES = 64
MAX_DISCARDED = 16 * 2**20
LINGER_SECONDS = 2.0


class _Phase(Enum):
    """The part of a message that comes next; trailers belong to the body."""

    IDLE = auto()
    HEAD = auto()
    BODY = auto()


class _RefusedError(Exception):
    """Raised in a callback of the parser, which stops it; the error is in ``_fault``."""


class Connection(HttpToolsProtocol):
    """Refuses what exceeds a limit with an error document, reports its end, and answers HTTP/1.0
    without chunks.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        loop: asyncio.AbstractEventLoop,
        *,
        entrance: Entrance,
        on_end: Callable[[], None],
    ) -> None:
        super().__init__(config, server_state, {}, loop)
        self._entrance = entrance
        self._on_end = on_end
        self._phase = _Phase.IDLE
        self._unfed = b""
        self._head_bytes = 0
        self._silent_bytes = 0  # since the parser's last report
        self._body_bytes = self._num_pieces = self._discarded = 0
        self._running: RequestResponseCycle | None = None  # the last one started
        self._fault: ApiError | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timed: _Phase | None = None  # the phase that ``_timer`` bounds
        self._read_timer: asyncio.TimerHandle | None = None

    # ----------------------------------------------------------------- the transport

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if not self._entrance.enter(self):
            self.app = self._entrance.crowded(self.app)
        self._limit(_Phase.HEAD)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True  # uvicorn notifies only the latest request
            self._running.message_event.set()
        for timer in (self._timer, self._read_timer):
            if timer is not None:
                timer.cancel()
        self._entrance.leave(self)
        self._on_end()

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if self._fault is not None:
            self._discard(len(data))
            return
        self._unfed = self._unfed + data if self._unfed else data
        self._feed()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._read_timer is None:
            self._await_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None

    def evict(self) -> None:
        """Closes the connection, which waits for its client, in favour of a new one."""
        if self._phase is not _Phase.IDLE:
            text = "The request was not complete when other clients asked for its connection"
            self._refuse(ApiError(408, text), linger=False)
        self.transport.close()

    # ----------------------------------------------------------------- the parser

    def _feed(self) -> None:
        """Parses what has come, up to a request that must wait for an earlier one's answer."""
        data, position = memoryview(self._unfed), 0
        while position < len(data) and not self._stopped():
            piece = data[position : position + SLICE_BYTES]
            position += len(piece)
            self._silent_bytes += len(piece)
            try:
                self.parser.feed_data(piece)
            except httptools.HttpParserUpgrade:
                pass  # not offered: the request is answered as any other
            except httptools.HttpParserError:
                self._refuse(self._fault or ApiError(400, "Invalid HTTP request received."))
                return
            if self._silent_bytes > MAX_HEAD_BYTES + SLICE_BYTES:
                self._refuse(_head_too_large())
                return
        self._unfed = bytes(data[position:])
        if self._unfed:
            self.flow.pause_reading()
        self._limit(self._phase)

    def _stopped(self) -> bool:
        return bool(self.pipeline) or self._fault is not None or self.transport.is_closing()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._phase = _Phase.HEAD
        self._head_bytes = self._body_bytes = self._num_pieces = self._discarded = 0

    def on_url(self, url: bytes) -> None:
        self._count_head(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._silent_bytes = 0
        self._count_head(len(name) + len(value) + 4)
        if self._phase is _Phase.HEAD:  # trailers are no headers of the request
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._silent_bytes = 0
        super().on_headers_complete()
        self._phase = _Phase.BODY

    def on_body(self, body: bytes) -> None:
        self._silent_bytes = 0
        self._body_bytes += len(body)
        self._num_pieces += 1
        if self._num_pieces > FREE_PIECES and self._body_bytes < MIN_PIECE_BYTES * self._num_pieces:
            text = f"The body comes in {self._num_pieces} pieces of less than {MIN_PIECE_BYTES} bytes"
            self._stop(ApiError(400, text))
        if self.cycle.response_complete:
            self._discard(len(body))
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._silent_bytes = 0
        self._phase = _Phase.IDLE
        super().on_message_complete()
        if self.cycle.response_complete:
            self._entrance.waits(self)
        else:
            self._entrance.works(self)

    def _count_head(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > MAX_HEAD_BYTES:
            self._stop(_head_too_large())

    def _stop(self, error: ApiError) -> None:
        self._fault = error
        raise _RefusedError

    # ----------------------------------------------------------------- answers

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGIApp) -> None:  # type: ignore[override]
        self._running = cycle
        if cycle.scope["http_version"] == "1.0":
            app = close_delimited(app, cycle)
        super()._start_asgi_task(cycle, app)  # type: ignore[arg-type]

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            return
        if self.cycle.response_complete:  # else the next request of the connection is answered already
            if self._fault is not None:
                self._say(self._fault)
                return
            self._entrance.waits(self)
            if self._unfed or self._phase is not _Phase.IDLE:
                self._unset_keepalive_if_required()
        self._feed()

    def _refuse(self, error: ApiError, linger: bool = True) -> None:
        """Answers with ``error`` and closes, after the answers of earlier requests."""
        self._fault, self._unfed = error, b""
        if self.transport.is_closing():
            return
        cycle = self.cycle
        if self._phase is _Phase.BODY and not cycle.response_complete:  # the request will not be complete
            if cycle.response_started:
                self.transport.close()
                return
            cycle.disconnected = True
            cycle.message_event.set()
            if self.pipeline and self.pipeline[0][0] is cycle:
                self.pipeline.popleft()
                return
            self._say(error, linger)
        elif cycle is None or cycle.response_complete:
            self._say(error, linger)

    def _say(self, error: ApiError, linger: bool = True) -> None:
        """Writes ``error``, then reads on for a moment: closing at once would reset the connection,
        and a client that still sends would not see the answer.
        """
        self._unset_keepalive_if_required()
        body = error_body(error.status_code, error.detail)
        head = (
            f"HTTP/1.1 {error.status_code} {HTTPStatus(error.status_code).phrase}",
            "content-type: application/json",
            f"content-length: {len(body)}",
            "connection: close",
            "\r\n",
        )
        self.transport.write("\r\n".join(head).encode() + body)
        self._limit(None)
        if not linger:
            self.transport.close()
            return
        self.transport.write_eof()
        self.flow.resume_reading()
        self._timer = self.loop.call_later(LINGER_SECONDS, self.transport.abort)

    def _discard(self, size: int) -> None:
        """Counts bytes that come after the answer they belong to."""
        self._discarded += size
        if self._discarded > MAX_DISCARDED:
            self.transport.abort()

    # ----------------------------------------------------------------- deadlines

    def _limit(self, phase: _Phase | None) -> None:
        """Sets the deadline of ``phase``, unless it runs already; none while an earlier request is
        answered, and none between requests, which uvicorn bounds itself.
        """
        answering = self.cycle is not None and not self.cycle.response_complete
        if phase is _Phase.IDLE or (phase is _Phase.HEAD and answering) or self.pipeline:
            phase = None
        if phase is self._timed:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._timed = phase
        if phase is not None:
            limits = self._entrance.limits
            seconds = limits.head_deadline if phase is _Phase.HEAD else limits.body_deadline
            self._timer = self.loop.call_later(seconds, self._on_deadline, phase, seconds)

    def _on_deadline(self, phase: _Phase, seconds: float) -> None:
        answered = self.cycle is not None and self.cycle.response_complete
        if self._phase is _Phase.IDLE or (self._phase is _Phase.BODY and answered):
            self.transport.close()  # no request to answer
            return
        part = "head" if phase is _Phase.HEAD else "body"
        text = f"The request's {part} was not complete after {seconds:g} s (frontend.{part}_deadline)"
        self._refuse(ApiError(408, text))

    def _await_reader(self, before: int | None = None) -> None:
        """Ends the connection of a client that does not read its answer. ``before``: bytes that
        were unwritten at the last look.
        """
        unwritten = self.transport.get_write_buffer_size()
        if before is not None and unwritten >= before:
            self.transport.abort()
            return
        seconds = self._entrance.limits.read_deadline
        self._read_timer = self.loop.call_later(seconds, self._await_reader, unwritten)


def _head_too_large() -> ApiError:
    return ApiError(431, f"The request's head is larger than {MAX_HEAD_BYTES} bytes")
