"""Streams as server-sent events: chunks from byte templates, sent where their tokens arrive.

Everything of a chunk but the text is fixed when the stream starts. A reader that lags gets what has
come in meanwhile as one merged chunk per choice.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import MutableMapping
from typing import Any

import msgspec
from starlette.responses import Response

from ..api.errors import ApiError, error_body
from ..reply import Outline, Receive, Reply
from ..requests.generation import Generation
from .asgi_writer import Outlet, Send

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
    """The fixed bytes of one choice's chunks: ``head`` + text + ``tail`` is a plain chunk.

    Where there is more than text, ``head_delta`` + an object + ``tail_delta``.
    """

    __slots__ = ("close_text", "head", "head_delta", "head_role", "tail", "tail_delta")

    def __init__(self, outline: Outline, index: int) -> None:
        kind = "chat.completion.chunk" if outline.chat else "text_completion"
        shared = {"id": outline.id, "object": kind, "created": outline.created, "model": outline.model}
        start = b"data: " + _encode(shared)[:-1]
        choice = b',"choices":[{"index":%d,' % index
        self.head = start + choice + (b'"delta":{"content":' if outline.chat else b'"text":')
        self.head_delta = start + choice + b'"delta":'
        self.head_role = (
            start
            + choice
            + b'"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]'
        )
        self.close_text = b"}" if outline.chat else b""
        self.tail_delta = b',"logprobs":null,"finish_reason":null}]}\n\n'
        self.tail = self.close_text + self.tail_delta


class Stream(Response):
    """A raw ASGI response that takes over the generations of ``reply`` and writes their chunks as
    they come.
    """

    def __init__(self, reply: Reply) -> None:
        self.status_code = 200
        self.background = None
        self._reply = reply
        self._outline = reply.outline
        self._templates = [Template(reply.outline, generation.index) for generation in reply.generations]
        outline = self._outline
        self._plain = not (outline.num_logprobs >= 0 or outline.return_token_ids or outline.continuous_usage)
        self._interval = outline.interval
        self._unfinished = len(reply.generations)
        self._error: ApiError | None = None
        self._ended = False
        self._closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._outlet: Outlet | None = None

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
            self._outlet = Outlet(scope.get(SEND_KEY, send), self._flush)
            self._error = self._reply.error
            for generation in self._reply.generations:
                generation.sink = self
            self._flush()
            await asyncio.wait((self._closed, self._reply.gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._reply.close()

    def advance(self, generation: Generation) -> None:
        if self._outlet is None or self._outlet.busy or self._ended:
            return  # merged into the next chunk
        chunk = self._chunk(generation)
        if chunk:
            self._write(chunk)

    def fail(self, generation: Generation, error: ApiError) -> None:
        if self._error is None and not self._ended:
            self._error = error
            self._reply.abort()
            if self._outlet is not None and not self._outlet.busy:
                self._flush()

    def _flush(self) -> None:
        """Everything there is to say, in one write; called when the reader has caught up."""
        if self._ended:
            self._close()
            return
        chunks = b"".join(self._chunk(generation) for generation in self._reply.generations)
        if chunks or self._error is not None:
            self._write(chunks)

    def _write(self, body: bytes) -> None:
        assert self._outlet is not None
        if self._error is not None:
            error = self._error
            body += b"data: " + error_body(error.status_code, error.detail, error.param) + b"\n\n" + DONE
            self._ended = True
        elif not self._unfinished:
            body += self._usage_chunk() + DONE
            self._ended = True
        try:
            self._outlet.write(body, more=not self._ended)
        except (
            Exception
        ):  # the connection is unusable; returning without a complete body makes the server close it
            _log.warning("stream %s broke", self._outline.id, exc_info=True)
            self._ended = True
        if self._ended and not self._outlet.busy:
            self._close()

    def _close(self) -> None:
        if not self._closed.done():
            self._closed.set_result(None)

    def _chunk(self, generation: Generation) -> bytes:
        """What ``generation`` has and has not been sent; empty when there is nothing to say yet."""
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
            return _said(generation, template) + template.tail_delta
        return self._full_chunk(generation, template)

    def _full_chunk(self, generation: Generation, template: Template) -> bytes:
        """A chunk with the optional parts: the first of a choice, the last, or with ids, logprobs
        or usage.
        """
        outline, finish = self._outline, generation.finish
        opening = b"" if generation.num_taken else self._opening(generation, template)
        parts = [
            opening,
            _said(generation, template),
            b',"logprobs":',
            _encode(self._reply.logprobs(generation)),
        ]
        parts += [b',"finish_reason":', _encode(generation.finish_reason)]
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

    def _opening(self, generation: Generation, template: Template) -> bytes:
        """The chunk before the first text of a chat choice."""
        if not self._outline.chat:
            return b""
        parts = [template.head_role]
        if self._outline.return_token_ids:
            parts += [b',"prompt_token_ids":', _encode(generation.prompt)]
        if self._outline.continuous_usage:
            usage = {
                **self._reply.usage(generation),
                "completion_tokens": 0,
                "total_tokens": len(generation.prompt),
            }
            parts += [b',"usage":', _encode(usage)]
        return b"".join([*parts, b"}\n\n"])

    def _usage_chunk(self) -> bytes:
        if not self._outline.include_usage:
            return b""
        outline = self._outline
        kind = "chat.completion.chunk" if outline.chat else "text_completion"
        chunk = {
            "id": outline.id,
            "object": kind,
            "created": outline.created,
            "model": outline.model,
            "choices": [],
        }
        return b"data: " + _encode({**chunk, "usage": self._reply.usage()}) + b"\n\n"


def _said(generation: Generation, template: Template) -> bytes:
    """A chunk up to and including what was said since the last one."""
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
    if said.calls:
        delta["tool_calls"] = said.calls
    return template.head_delta + _encode(delta)
