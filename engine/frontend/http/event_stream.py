"""Streams of named events: a narrator's bytes, written as the tokens of its reply arrive."""

from __future__ import annotations

import asyncio
import logging

from ..api.errors import ApiError
from ..dialects.dialect import Narrator, pieces_of
from ..reply import Reply
from ..requests.generation import Generation
from .asgi_writer import AsgiWriter, Send

_log = logging.getLogger("lockstep.frontend")


class EventWriter:
    """The sink that turns the progress of a reply's only generation into events. A reader that lags
    gets merged ones. ``closed`` is set when the last one has been written.
    """

    __slots__ = (
        "_ended",
        "_error",
        "_generation",
        "_interval",
        "_narrator",
        "_reply",
        "_writer",
        "closed",
    )

    def __init__(self, reply: Reply, narrator: Narrator, send: Send) -> None:
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._reply = reply
        self._generation = reply.generations[0]
        self._narrator = narrator
        self._interval = reply.outline.interval
        self._error = reply.error
        self._ended = False
        self._writer = AsgiWriter(send, self._on_idle)

    def take_over(self) -> None:
        """Becomes the sink of the generation, and writes all that the reply has collected."""
        self._generation.sink = self
        self._write(self._narrator.opening() + self._events())

    def advance(self, generation: Generation) -> None:
        if not (self._writer.busy or self._ended):
            self._write(self._events())

    def fail(self, generation: Generation, error: ApiError) -> None:
        if self._error is None and not self._ended:
            self._error = self._reply.error = error
            self._reply.abort()
            if not self._writer.busy:
                self._write(self._events())

    def _on_idle(self) -> None:
        """Writes further events: the reader has caught up."""
        if self._ended:
            self._close()
        else:
            self._write(self._events())

    def _events(self) -> bytes:
        """All events that have come and were not written yet."""
        if self._error is not None:
            self._ended = True
            return self._narrator.failing(self._error)
        generation = self._generation
        if generation.finish is not None:
            self._ended = True
            return self._narrator.tell(pieces_of(generation)) + self._narrator.ending()
        taken = generation.num_taken
        if not generation.pending or (taken and len(generation.tokens) - taken < self._interval):
            return b""
        generation.num_taken = len(generation.tokens)
        return self._narrator.tell(pieces_of(generation))

    def _write(self, body: bytes) -> None:
        if not body:
            return
        try:
            self._writer.write(body, more=not self._ended)
        except Exception:  # the connection is unusable; the server closes it, as its body is incomplete
            _log.warning("stream %s broke", self._reply.outline.id, exc_info=True)
            self._ended = True
        if self._ended and not self._writer.busy:
            self._close()

    def _close(self) -> None:
        if not self.closed.done():
            self.closed.set_result(None)
