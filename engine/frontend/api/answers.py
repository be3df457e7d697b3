"""The documents that the server answers with, for its OpenAPI document. They are written elsewhere,
without these models; tests hold that both agree. Further fields may come.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

FinishReason = Literal["stop", "length", "tool_calls", "function_call", "abort"]


class AnswerDocument(BaseModel):
    """Base of the documents."""

    model_config = ConfigDict(extra="allow")


class ErrorDetail(AnswerDocument):
    """``param`` is the path of the field at fault, ``code`` the HTTP status."""

    message: str
    type: str
    param: str | None
    code: int


class ErrorAnswer(AnswerDocument):
    error: ErrorDetail


class CachedUsage(AnswerDocument):
    cached_tokens: int


class ReasoningUsage(AnswerDocument):
    reasoning_tokens: int


class Usage(AnswerDocument):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedUsage
    completion_tokens_details: ReasoningUsage


class CalledFunctionAnswer(AnswerDocument):
    """``arguments`` is JSON as text."""

    name: str
    arguments: str


class ToolCallAnswer(AnswerDocument):
    id: str
    type: Literal["function"]
    function: CalledFunctionAnswer


class GivenTextAnswer(AnswerDocument):
    name: str
    input: str


class TextCallAnswer(AnswerDocument):
    """A call of a custom tool."""

    id: str
    type: Literal["custom"]
    custom: GivenTextAnswer


class AnswerMessage(AnswerDocument):
    role: Literal["assistant"]
    content: str | None
    reasoning: str | None
    reasoning_content: str | None
    tool_calls: list[ToolCallAnswer | TextCallAnswer]


Ranked = list[dict[str, dict[str, Any]] | None] | None  # by token id, for each position of a prompt


class Choice(AnswerDocument):
    """``stop_reason`` is the stop string or stop id that ended the text."""

    index: int
    logprobs: dict[str, Any] | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    token_ids: list[int] | None


class ChatChoice(Choice):
    message: AnswerMessage


class TextChoice(Choice):
    text: str
    prompt_logprobs: Ranked
    prompt_token_ids: list[int] | None


class Generated(AnswerDocument):
    id: str
    created: int
    model: str
    usage: Usage


class ChatAnswer(Generated):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    prompt_logprobs: Ranked
    prompt_token_ids: list[int] | None


class TextAnswer(Generated):
    object: Literal["text_completion"]
    choices: list[TextChoice]


class ModelCard(AnswerDocument):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int | None


class ModelList(AnswerDocument):
    object: Literal["list"]
    data: list[ModelCard]


class Tokenized(AnswerDocument):
    count: int
    max_model_len: int | None
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(AnswerDocument):
    prompt: str


class TokenizerInfo(AnswerDocument):
    tokenizer_class: str
    vocab_size: int
    bos_token: str | None
    eos_token: str | None
    chat_template: str | None


class Healthy(AnswerDocument):
    status: Literal["ok", "ready"]


class Generates(AnswerDocument):
    """Answer of /health/generate; ``seconds`` that one token took."""

    status: Literal["ok"]
    seconds: float


class Version(AnswerDocument):
    version: str


class LoadAnswer(AnswerDocument):
    server_load: int
    num_running: int
    num_waiting: int
    kv_usage: float


class DrainAnswer(AnswerDocument):
    status: Literal["draining"]
    deadline: float


class StoryAnswer(AnswerDocument):
    """``arrived`` is Unix time, ``seconds`` count from then; ``status`` null: no answer yet."""

    id: str
    path: str
    status: int | None
    ended: bool
    arrived: float
    seconds: float
    choices: list[dict[str, Any]]


class ClusterAnswer(AnswerDocument):
    phase: str
    reason: str
    epoch: int
    ranks: list[dict[str, Any]]


class TimelineAnswer(AnswerDocument):
    """Chrome's trace event format. ``otherData``: why there are fewer steps than asked, and how the
    clocks of hosts were aligned.
    """

    displayTimeUnit: str
    otherData: dict[str, Any]
    traceEvents: list[dict[str, Any]]
