"""The way of a request for generated text, in any dialect, from its body to its answer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import msgspec
from fastapi import Request
from pydantic import TypeAdapter
from starlette.responses import Response

from ..api.errors import CLIENT_GONE, ApiError
from ..api.schemas import GenerationRequest
from ..dialects.dialect import Asked, Narrated
from ..reply import Reply
from ..service import Service
from .access import ID_KEY
from .bodies import Adapter, Bodies
from .event_stream import EventWriter
from .request_log import RECORD_KEY
from .streams import Stream, chunk_stream

Ask = TypeVar("Ask", bound=Asked)


class PlainAsked:
    """A request that needs no translation: a chat, or a text completion."""

    def __init__(self, chat: GenerationRequest) -> None:
        self.chat = chat

    def blamed(self, error: ApiError) -> ApiError:
        return error

    def document(self, reply: Reply) -> dict[str, Any]:
        return reply.document()


class Plain:
    """Makes ``PlainAsked`` of bodies that ``adapter`` takes."""

    def __init__(self, adapter: TypeAdapter[Any]) -> None:
        self._adapter = adapter

    def validate_python(self, document: Any, /) -> PlainAsked:
        return PlainAsked(self._adapter.validate_python(document))


def chunks(asked: PlainAsked, reply: Reply) -> Response:
    return chunk_stream(reply)


def events(asked: Narrated, reply: Reply) -> Response:
    return Stream(reply, partial(EventWriter, reply, asked.narrator(reply)))


async def generate(
    service: Service,
    bodies: Bodies,
    request: Request,
    kind: Adapter[Ask],
    stream: Callable[[Ask, Reply], Response],
) -> Response:
    """Waits for the whole answer, or for the first token of a stream, so that an error before it
    has a status of its own.
    """
    async with bodies.parsed(request, kind) as asked:
        streams = bool(asked.chat.stream)
        try:
            reply = await service.open(asked.chat, request.scope[ID_KEY], request.receive)
        except ApiError as error:
            raise asked.blamed(error) from None
    request.scope[RECORD_KEY].reply = reply
    handed_over = False
    try:
        await (reply.opened if streams else reply.done)
        if reply.gone.done():
            return Response(status_code=CLIENT_GONE)
        if reply.error is not None:
            raise asked.blamed(reply.error)
        if not streams:
            return Response(msgspec.json.encode(asked.document(reply)), media_type="application/json")
        handed_over = True
        return stream(asked, reply)
    finally:
        if not handed_over:
            reply.close()
