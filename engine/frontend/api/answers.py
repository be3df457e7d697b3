"""The documents that the server answers with, for its OpenAPI document. They are written elsewhere,
without these models; tests hold that both agree. Further fields may come.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

FinishReason = Literal["stop", "length", "tool_calls", "abort"]


class Answer(BaseModel):
    """Base of the documents."""

    model_config = ConfigDict(extra="allow")


class ErrorDetail(Answer):
    """``param`` is the path of the field at fault, ``code`` the HTTP status."""

    message: str
    type: str
    param: str | None
    code: int


class ErrorAnswer(Answer):
    error: ErrorDetail


class CachedTokens(Answer):
    cached_tokens: int


class Usage(Answer):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class CalledFunctionAnswer(Answer):
    """``arguments`` is JSON as text."""

    name: str
    arguments: str


class ToolCallAnswer(Answer):
    id: str
    type: Literal["function"]
    function: CalledFunctionAnswer


class AnswerMessage(Answer):
    role: Literal["assistant"]
    content: str | None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallAnswer] | None = None


class Choice(Answer):
    """``stop_reason`` is the stop string or stop id that ended the text."""

    index: int
    logprobs: dict[str, Any] | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None


class ChatChoice(Choice):
    message: AnswerMessage


class TextChoice(Choice):
    text: str


class Generated(Answer):
    id: str
    created: int
    model: str
    usage: Usage


class ChatAnswer(Generated):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class TextAnswer(Generated):
    object: Literal["text_completion"]
    choices: list[TextChoice]


class ModelCard(Answer):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int | None


class ModelList(Answer):
    object: Literal["list"]
    data: list[ModelCard]


class Tokenized(Answer):
    count: int
    max_model_len: int | None
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(Answer):
    prompt: str


class TokenizerInfo(Answer):
    tokenizer_class: str
    vocab_size: int
    chat_template: str | None


class Healthy(Answer):
    status: Literal["ok", "ready"]


class Generates(Answer):
    """``seconds`` that one token took."""

    status: Literal["ok"]
    seconds: float


class Version(Answer):
    version: str


class LoadAnswer(Answer):
    server_load: int
    num_running: int
    num_waiting: int
    kv_usage: float


class DrainAnswer(Answer):
    status: Literal["draining"]
    deadline: float


class ClusterAnswer(Answer):
    phase: str
    reason: str
    epoch: int
    ranks: list[dict[str, Any]]
