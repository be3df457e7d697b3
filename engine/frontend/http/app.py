"""The HTTP application: its layers, its routes, and their OpenAPI document."""

from __future__ import annotations

from functools import partial
from typing import Any

import msgspec
from fastapi import APIRouter, FastAPI, Request
from pydantic import TypeAdapter
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp

from .... import __version__
from ...tracing.timeline import chrome_trace
from ..api.cluster import describe_cluster
from ..api.drain import DRAIN_SECONDS, MAX_DRAIN_SECONDS, DrainRequest
from ..api.errors import ApiError, bad_request
from ..api.invocation import Invocation
from ..api.schemas import (
    ChatRequest,
    CompletionRequest,
    Conversation,
    DetokenizeRequest,
    TokenizeChat,
    TokenizeRequest,
    TokenizeText,
)
from ..api.timeline import TimelineRequest
from ..requests.conversation import conversation_text
from ..requests.model import ServedModel
from ..requests.token_rules import check_ids
from ..service import Service
from .access import ID_KEY, AccessMiddleware
from .admin_page import admin_page
from .agents import agent_routes
from .bodies import Bodies, parse
from .cors import with_cors
from .docs import docs_router
from .generation import Plain, chunks, generate
from .keys import KeyMiddleware
from .observers import Observers
from .openapi import complete
from .operations import GENERATIVE
from .request_log import RECORD_KEY, refuse
from .stories import Stories


def build_app(service: Service, observers: Observers | None = None) -> ASGIApp:
    """The ASGI application of one frontend."""
    app = FastAPI(
        title="Lockstep",
        version=__version__,
        openapi_url=None,
        redirect_slashes=False,
        # FastAPI's own, which would export bodies that were refused; see spans.py for ours.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    bodies = Bodies(service.spec.limits.max_body, service.spec.limits.body_memory)
    for make in (_generation, agent_routes, _texts, _admin):
        app.include_router(make(service, bodies))
    stories = Stories()
    app.include_router(_stories(stories))
    app.include_router(_status(service))
    app.include_router(admin_page())
    app.include_router(docs_router(partial(complete, app.openapi, bool(service.spec.api_keys))))
    app.add_exception_handler(HTTPException, _on_error)
    app.add_exception_handler(Exception, _on_bug)
    spec = service.spec
    keyed = KeyMiddleware(app, spec.api_keys, spec.admin_key)
    inner = with_cors(keyed, spec.cors_origins)
    return AccessMiddleware(inner, service.metrics, stories, spec.access_log, observers)


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return refuse(request.scope, error if isinstance(error, ApiError) else _routing_error(request, error))


async def _on_bug(request: Request, error: Exception) -> Response:
    """Unhandled exception: answers 500 without a traceback, which AccessMiddleware logs."""
    text = f"Internal error; see the server's log under request id {request.scope[ID_KEY]}"
    return refuse(request.scope, ApiError(500, text))


def _routing_error(request: Request, error: HTTPException) -> ApiError:
    """Errors 404 and 405 of the router, with a text that names the path."""
    path = request.url.path[:200]
    if error.status_code == 404:
        served = ", ".join(GENERATIVE)
        return ApiError(404, f"There is nothing at {path}; {served} are served, the rest is in /openapi.json")
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "").replace("GET", "GET, HEAD")
        text = f"{request.scope[RECORD_KEY].method} is not allowed at {path}: only {allowed}"
        return ApiError(405, text, headers={"Allow": allowed})
    return ApiError(error.status_code, str(error.detail), headers=dict(error.headers or {}))


def _json(document: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(document), status, media_type="application/json")


def _generation(service: Service, bodies: Bodies) -> APIRouter:
    router = APIRouter()
    chats = Plain(TypeAdapter(ChatRequest))
    completions = Plain(TypeAdapter(CompletionRequest))
    either = Plain(TypeAdapter(Invocation))

    @router.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await generate(service, bodies, request, chats, chunks)

    @router.post("/v1/completions")
    async def text_completions(request: Request) -> Response:
        return await generate(service, bodies, request, completions, chunks)

    @router.post("/invocations")
    async def invocations(request: Request) -> Response:
        """SageMaker's name for both: a body with messages is a chat."""
        return await generate(service, bodies, request, either, chunks)

    @router.get("/health/generate")
    async def health_generate() -> Response:
        return _json({"status": "ok", "seconds": round(await service.probe(), 6)})

    return router


def _texts(service: Service, bodies: Bodies) -> APIRouter:
    router = APIRouter()
    codec = service.model.codec
    tokenize_requests: TypeAdapter[TokenizeText | TokenizeChat] = TypeAdapter(TokenizeRequest)
    detokenize_requests = TypeAdapter(DetokenizeRequest)

    @router.get("/v1/models")
    async def models() -> Response:
        return _json({"object": "list", "data": [_card(service)]})

    @router.get("/v1/models/{model:path}")
    async def model(model: str) -> Response:
        service.check_model(model)
        return _json(_card(service))

    @router.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        async with bodies.parsed(request, tokenize_requests) as ask:
            service.check_model(ask.model)
            return await service.in_thread(_tokens, service.model, ask, _max_len(service))

    @router.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        async with bodies.parsed(request, detokenize_requests) as ask:
            service.check_model(ask.model)
            return await service.in_thread(_text, service.model, ask)

    @router.get("/tokenizer_info")
    async def tokenizer_info() -> Response:
        return _json(codec.describe())

    return router


def _tokens(model: ServedModel, ask: TokenizeText | TokenizeChat, max_len: int | None) -> Response:
    """The answer of /tokenize; for a thread, as there may be millions of tokens."""
    codec = model.codec
    if isinstance(ask, Conversation):
        ids = codec.encode(conversation_text(codec, model.habits, ask), bool(ask.add_special_tokens))
    else:
        ids = codec.encode(ask.prompt, ask.add_special_tokens is not False)
    names = [codec.token_name(token) for token in ids] if ask.return_token_strs else None
    return _json({"count": len(ids), "max_model_len": max_len, "tokens": ids, "token_strs": names})


def _text(model: ServedModel, ask: DetokenizeRequest) -> Response:
    """The answer of /detokenize; for a thread."""
    check_ids(ask.tokens, model.vocab_size, "tokens")
    return _json({"prompt": model.codec.decode(ask.tokens, False)})


def _max_len(service: Service) -> int | None:
    return None if service.cluster is None else service.cluster.max_len


def _card(service: Service) -> dict[str, Any]:
    name = service.model.name
    return {
        "id": name,
        "object": "model",
        "created": int(service.started),
        "owned_by": "lockstep",
        "root": name,
        "parent": None,
        "max_model_len": _max_len(service),
    }


def _status(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/ping")  # SageMaker's name
    @router.get("/health")
    async def health() -> Response:
        reason = service.unable()
        if reason is not None:
            raise ApiError(503, reason, retry_after=1)
        return _json({"status": "ok", **service.degraded()})

    @router.get("/ready")
    async def ready() -> Response:
        error = service.not_ready()
        if error is not None:
            raise error
        return _json({"status": "ready"})

    @router.get("/version")
    async def version() -> Response:
        return _json({"version": __version__})

    @router.get("/metrics")
    async def metrics() -> Response:
        text = service.metrics.render(len(service.requests))
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @router.get("/load")
    async def load() -> Response:
        cluster = service.cluster
        document = {
            "server_load": len(service.requests) + service.metrics.open_elsewhere(),
            "num_running": cluster.num_running if cluster else 0,
            "num_waiting": cluster.num_waiting if cluster else 0,
            "kv_usage": cluster.kv_usage if cluster else 0.0,
        }
        return _json(document)

    return router


def _stories(stories: Stories) -> APIRouter:
    router = APIRouter()

    @router.get("/admin/requests/{id}")
    async def story(id: str) -> Response:
        found = stories.find(id)
        if found is None:
            text = f"No request {id[:128]!r} is known here: it may be too old, or that of another frontend"
            raise ApiError(404, text)
        return _json(found)

    return router


def _admin(service: Service, bodies: Bodies) -> APIRouter:
    router = APIRouter()
    drains = TypeAdapter(DrainRequest)
    timelines = TypeAdapter(TimelineRequest)

    @router.post("/admin/drain")
    async def drain(request: Request) -> Response:
        async with bodies.read(request) as body:
            deadline = parse(body, drains).deadline if body else DRAIN_SECONDS
        if not 0 <= deadline <= MAX_DRAIN_SECONDS:
            text = f"deadline: should be between 0 and {MAX_DRAIN_SECONDS} seconds (got {deadline})"
            raise bad_request(text, "deadline")
        service.drain(deadline)
        return _json({"status": "draining", "deadline": deadline}, 202)

    @router.post("/admin/timeline")
    async def timeline(request: Request) -> Response:
        async with bodies.read(request) as body:
            ask = parse(body, timelines) if body else TimelineRequest()
        end, spans = await service.timelines.take(ask.steps, ask.seconds)
        hosts = {rank.rank: rank.host for rank in service.cluster.ranks} if service.cluster else {}
        trace = await service.in_thread(chrome_trace, end, spans, hosts)
        return Response(trace, media_type="application/json")

    @router.get("/admin/cluster")
    async def cluster() -> Response:
        if service.cluster is None:
            raise ApiError(503, "There is no message from the controller yet", retry_after=1)
        document = describe_cluster(service.cluster) | service.history.describe()
        return _json(document | {"trouble": service.unable() or ""})

    return router
