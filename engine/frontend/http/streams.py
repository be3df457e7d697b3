"""Streams as server-sent events: chunks made from byte templates, written as their tokens arrive.

All bytes of a chunk except its text are fixed when the stream starts. A slow reader gets the tokens
of the meantime as one merged chunk per choice.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, MutableMapping
from functools import partial
from typing import Any, Protocol

import msgspec
from starlette.responses import Response

from ..api.errors import ApiError, error_body
from ..reply import Receive, Reply
from ..requests.generation import Generation
from ..requests.prepared import Outline
from .asgi_writer import AsgiWriter, Send

DONE = b"data: [DONE]\n\n"
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
SEND_KEY = "lockstep.send"

_log = logging.getLogger("lockstep.frontend")
_encode = msgspec.json.encode


class Template:
    """The fixed bytes of one choice's chunks. ``head`` + text + ``tail`` is a chunk of text alone;
    ``head_delta`` + an object + ``tail_delta`` is any other.
    """

    __slots__ = ("close_text", "head", "head_delta", "head_role", "tail", "tail_delta")

    def __init__(self, outline: Outline, index: int) -> None:
        start = b"data: " + _encode(_shared_fields(outline))[:-1]
        choice = b',"choices":[{"index":%d,' % index
        self.head = start + choice + (b'"delta":{"content":' if outline.chat else b'"text":')
        self.head_delta = start + choice + b'"delta":'
        role = b'"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]'
        self.head_role = start + choice + role
        self.close_text = b"}" if outline.chat else b""
        self.tail_delta = b',"logprobs":null,"finish_reason":null}]}\n\n'
        self.tail = self.close_text + self.tail_delta


class Writer(Protocol):
    """Writes a reply. ``closed`` is set when the last part has been written."""

    closed: asyncio.Future[None]

    def take_over(self) -> None:
        """Becomes the sink of the generations, and writes all that the reply has collected."""


class Stream(Response):
    """A raw ASGI response that writes the generations of ``reply`` as they advance, by the writer
    that ``write`` makes.
    """

    def __init__(self, reply: Reply, write: Callable[[Send], Writer]) -> None:
        self.status_code = 200
        self.background = None
        self._reply = reply
        self._write = write

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        reply = self._reply
        try:
            await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
            chunks = self._write(scope.get(SEND_KEY, send))
            chunks.take_over()
            await asyncio.wait((chunks.closed, reply.gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            reply.close()


def chunk_stream(reply: Reply) -> Stream:
    """The stream of a chat or a text completion."""
    return Stream(reply, partial(ChunkWriter, reply))


class ChunkWriter:
    """The sink that turns the progress of a reply's generations into chunks. ``closed`` is set when
    the last one has been written.
    """

    __slots__ = (
        "_ended",
        "_error",
        "_interval",
        "_outline",
        "_plain",
        "_reply",
        "_templates",
        "_unfinished",
        "_writer",
        "closed",
    )

    def __init__(self, reply: Reply, send: Send) -> None:
        outline = reply.outline
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._reply = reply
        self._outline = outline
        self._templates = [Template(outline, generation.index) for generation in reply.generations]
        self._plain = not (outline.num_logprobs >= 0 or outline.return_token_ids or outline.continuous_usage)
        self._interval = outline.interval
        self._unfinished = len(reply.generations)
        self._error = reply.error
        self._ended = False
        self._writer = AsgiWriter(send, self._flush)

    def take_over(self) -> None:
        """Becomes the sink of the generations, and writes all that the reply has collected."""
        for generation in self._reply.generations:
            generation.sink = self
        self._flush()

    def advance(self, generation: Generation) -> None:
        if self._writer.busy or self._ended:
            return  # merged into the next chunk
        chunk = self._chunk(generation)
        if chunk:
            self._write(chunk)

    def fail(self, generation: Generation, error: ApiError) -> None:
        if self._error is None and not self._ended:
            self._error = self._reply.error = error
            self._reply.abort()
            if not self._writer.busy:
                self._flush()

    def _flush(self) -> None:
        """Writes all pending text at once; called when the reader has caught up."""
        if self._ended:
            self._close()
            return
        chunks = b"".join(self._chunk(generation) for generation in self._reply.generations)
        if chunks or self._error is not None:
            self._write(chunks)

    def _write(self, body: bytes) -> None:
        if self._error is not None:
            error = self._error
            body += b"data: " + error_body(error.status_code, error.detail, error.param) + b"\n\n" + DONE
            self._ended = True
        elif not self._unfinished:
            body += self._usage_chunk() + DONE
            self._ended = True
        try:
            self._writer.write(body, more=not self._ended)
        except Exception:  # the connection is unusable; the server closes it, as its body is incomplete
            _log.warning("stream %s broke", self._outline.id, exc_info=True)
            self._ended = True
        if self._ended and not self._writer.busy:
            self._close()

    def _close(self) -> None:
        if not self.closed.done():
            self.closed.set_result(None)

    def _chunk(self, generation: Generation) -> bytes:
        """The part of ``generation`` that has not been sent; empty while there is none to send."""
        finish = generation.finish
        taken = generation.num_taken
        if finish is None:
            if not generation.pending:
                return b""
            if taken and len(generation.tokens) - taken < self._interval:
                return b""
        elif taken < 0 or finish == "error" or self._error is not None:
            return b""
        template = self._templates[generation.index]
        if finish is None and taken and self._plain:
            generation.num_taken = len(generation.tokens)
            if generation.parser is None:
                return template.head + _encode(generation.take_text()) + template.tail
            return self._text_or_delta(generation, template) + template.tail_delta
        return self._full_chunk(generation, template)

    def _full_chunk(self, generation: Generation, template: Template) -> bytes:
        """A chunk with optional parts: the first of a choice, the last, or one with ids, logprobs
        or usage.
        """
        outline = self._outline
        finish = generation.finish
        parts = [] if generation.num_taken else [self._opening(generation, template)]
        parts.append(self._text_or_delta(generation, template))
        parts += [b',"logprobs":', _encode(self._reply.logprobs(generation))]
        parts += [b',"finish_reason":', _encode(outline.reason(generation.finish_reason))]
        if finish is not None:
            parts += [b',"stop_reason":', _encode(generation.stop_reason)]
        if outline.return_token_ids:
            parts += [b',"token_ids":', _encode(generation.tokens[generation.num_taken :])]
            if not outline.chat and not generation.num_taken:
                parts += [b',"prompt_token_ids":', _encode(generation.prompt)]
        parts.append(b"}]")
        generation.num_taken = len(generation.tokens)
        if outline.continuous_usage:
            parts += [b',"usage":', _encode(self._reply.usage(generation))]
        parts.append(b"}\n\n")
        if finish is not None:
            self._unfinished -= 1
            generation.num_taken = -1  # nothing more may be taken
        return b"".join(parts)

    def _text_or_delta(self, generation: Generation, template: Template) -> bytes:
        """A chunk up to and including the text, or the delta, that has come since the last one."""
        if generation.parser is None:
            return template.head + _encode(generation.take_text()) + template.close_text
        said = generation.parser.take()
        if not (said.reasoning or said.calls):
            return template.head + _encode(said.content) + template.close_text
        delta: dict[str, Any] = {}
        if said.reasoning:
            delta["reasoning"] = delta["reasoning_content"] = said.reasoning
        if said.content:
            delta["content"] = said.content
        if said.calls and self._outline.legacy_call:
            delta["function_call"] = said.calls[0]["function"]
        elif said.calls:
            delta["tool_calls"] = said.calls
        return template.head_delta + _encode(delta)

    def _opening(self, generation: Generation, template: Template) -> bytes:
        """The chunk before the first text of a chat choice; none for a text completion."""
        if not self._outline.chat:
            return b""
        parts = [template.head_role]
        if self._outline.return_token_ids:
            parts += [b',"prompt_token_ids":', _encode(generation.prompt)]
        if self._outline.continuous_usage:
            nothing_yet = {
                "completion_tokens": 0,
                "total_tokens": len(generation.prompt),
                "completion_tokens_details": {"reasoning_tokens": 0},
            }
            parts += [b',"usage":', _encode(self._reply.usage(generation) | nothing_yet)]
        return b"".join([*parts, b"}\n\n"])

    def _usage_chunk(self) -> bytes:
        if not self._outline.include_usage:
            return b""
        chunk = _shared_fields(self._outline) | {"choices": [], "usage": self._reply.usage()}
        return b"data: " + _encode(chunk) + b"\n\n"


def _shared_fields(outline: Outline) -> dict[str, Any]:
    """The fields that begin every chunk."""
    kind = "chat.completion.chunk" if outline.chat else "text_completion"
    return {"id": outline.id, "object": kind, "created": outline.created, "model": outline.model}
