"""The operations of the server: the bodies each takes, its answers and its errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from ..api import agent_answers, answers
from ..api.drain import DrainRequest
from ..api.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeChat, TokenizeText
from ..api.timeline import TimelineRequest
from ..dialects.messages_body import CountRequest, MessagesRequest
from ..dialects.responses_body import ResponsesRequest


@dataclass(frozen=True)
class Operation:
    """``answers``: documents of the successful answer, none where it is plain text. ``bodies``:
    those it takes; ``example`` is one. ``errors``: statuses of its errors beside that of the key.
    """

    success: str
    answers: tuple[type[BaseModel], ...] = ()
    bodies: tuple[type[BaseModel], ...] = ()
    example: Any = None
    errors: tuple[int, ...] = ()
    status: int = 200
    streams: bool = False
    body_required: bool = True


_BODY = (400, 408, 413, 415, 503)  # errors of everything that takes a body
_TEXTS = (404, *_BODY)
_GENERATION = (500, *_TEXTS)
_MESSAGES = (500, *(529 if status == 503 else status for status in _TEXTS))
_CHAT = {"messages": [{"role": "user", "content": "What is 12 + 7?"}], "max_tokens": 64}
_TEXT = {"prompt": "Once upon a time", "max_tokens": 32}

OPERATIONS = {
    "/v1/chat/completions": Operation(
        "The reply", (answers.ChatAnswer,), (ChatRequest,), _CHAT, _GENERATION, streams=True
    ),
    "/v1/completions": Operation(
        "The completion", (answers.TextAnswer,), (CompletionRequest,), _TEXT, _GENERATION, streams=True
    ),
    "/invocations": Operation(
        "The reply to `messages` or the completion of `prompt`",
        (answers.ChatAnswer, answers.TextAnswer),
        (ChatRequest, CompletionRequest),
        _CHAT,
        _GENERATION,
        streams=True,
    ),
    "/v1/responses": Operation(
        "The response",
        (agent_answers.ResponseAnswer,),
        (ResponsesRequest,),
        {"input": "What is 12 + 7?", "max_output_tokens": 64},
        _GENERATION,
        streams=True,
    ),
    "/v1/messages": Operation(
        "The message", (agent_answers.MessageAnswer,), (MessagesRequest,), _CHAT, _MESSAGES, streams=True
    ),
    "/v1/messages/count_tokens": Operation(
        "The number of tokens of the prompt",
        (agent_answers.TokenCount,),
        (CountRequest,),
        {"messages": _CHAT["messages"]},
        (400, 404, 413),
    ),
    "/v1/models": Operation("The model, as a list", (answers.ModelList,)),
    "/v1/models/{model}": Operation("The model", (answers.ModelCard,), errors=(404,)),
    "/tokenize": Operation(
        "Token ids", (answers.Tokenized,), (TokenizeText, TokenizeChat), {"prompt": "Hello"}, _TEXTS
    ),
    "/detokenize": Operation(
        "The text", (answers.Detokenized,), (DetokenizeRequest,), {"tokens": [5, 6]}, _TEXTS
    ),
    "/tokenizer_info": Operation("Facts of the tokenizer", (answers.TokenizerInfo,)),
    "/health": Operation("Tokens can be generated", (answers.Healthy,), errors=(503,)),
    "/ping": Operation("As /health", (answers.Healthy,), errors=(503,)),
    "/ready": Operation("New requests are taken", (answers.Healthy,), errors=(503,)),
    "/health/generate": Operation("A token was generated", (answers.Generates,), errors=(500, 503)),
    "/version": Operation("The version", (answers.Version,)),
    "/metrics": Operation("Metrics in the text format of Prometheus"),
    "/load": Operation("Requests and use of the KV cache", (answers.LoadAnswer,)),
    "/admin/drain": Operation(
        "The cluster drains",
        (answers.DrainAnswer,),
        (DrainRequest,),
        {"deadline": 60},
        _BODY,
        status=202,
        body_required=False,
    ),
    "/admin/timeline": Operation(
        "The timeline of steps, in Chrome's trace event format",
        (answers.TimelineAnswer,),
        (TimelineRequest,),
        {"steps": 64, "seconds": 10},
        (*_BODY, 409),
        body_required=False,
    ),
    "/admin/cluster": Operation(
        "Phase, epoch, ranks and placement of experts", (answers.ClusterAnswer,), errors=(503,)
    ),
    "/admin/requests/{id}": Operation(
        "When a request queued, where it ran, how it ended", (answers.StoryAnswer,), errors=(404,)
    ),
}

GENERATIVE = [path for path, operation in OPERATIONS.items() if operation.streams and path.startswith("/v1/")]
