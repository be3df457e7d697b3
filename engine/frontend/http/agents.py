"""The routes of the dialects that agents speak beside chat."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from ..api.errors import ApiError
from ..dialects.messages_chat import CountAsked, MessagesAsked
from ..dialects.responses_chat import ResponsesAsked
from ..requests.model import ServedModel
from ..requests.prepare import chat_text
from ..service import Service
from .bodies import Bodies
from .generation import events, generate


def agent_routes(service: Service, bodies: Bodies) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/responses")
    async def responses(request: Request) -> Response:
        return await generate(service, bodies, request, ResponsesAsked, events)

    @router.post("/v1/messages")
    async def messages(request: Request) -> Response:
        return await generate(service, bodies, request, MessagesAsked, events)

    @router.post("/v1/messages/count_tokens")
    async def count_tokens(request: Request) -> Response:
        async with bodies.parsed(request, CountAsked) as asked:
            service.check_model(asked.chat.model)
            try:
                count = await service.in_thread(_count, service.model, asked)
            except ApiError as error:
                raise asked.blamed(error) from None
            return Response(msgspec.json.encode({"input_tokens": count}), media_type="application/json")

    return router


def _count(model: ServedModel, asked: MessagesAsked) -> int:
    """The number of tokens of the prompt; for a thread."""
    return len(model.codec.encode(chat_text(model, asked.chat), bool(asked.chat.add_special_tokens)))
