"""The documents of /v1/responses and /v1/messages, for the OpenAPI document. They are written
elsewhere, without these models; tests hold that both agree.
"""

from __future__ import annotations

from typing import Any, Literal

from .answers import AnswerDocument, ReasoningUsage


class InputUsage(AnswerDocument):
    cached_tokens: int


class ResponseUsage(AnswerDocument):
    input_tokens: int
    input_tokens_details: InputUsage
    output_tokens: int
    output_tokens_details: ReasoningUsage
    total_tokens: int


class OutputItemAnswer(AnswerDocument):
    """A message, reasoning, or a call, with the fields of its type."""

    id: str
    type: Literal["message", "reasoning", "function_call", "custom_tool_call"]
    status: Literal["completed", "incomplete"]


class ResponseAnswer(AnswerDocument):
    """``store`` is false: the server keeps nothing."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete", "failed"]
    error: dict[str, Any] | None
    incomplete_details: dict[str, Any] | None
    model: str
    output: list[OutputItemAnswer]
    usage: ResponseUsage
    store: Literal[False]


class ContentBlockAnswer(AnswerDocument):
    """A content block, with the fields of its type."""

    type: Literal["text", "thinking", "tool_use"]


class MessageUsage(AnswerDocument):
    """Usage of a message; ``input_tokens`` excludes cached ones."""

    input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class MessageAnswer(AnswerDocument):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[ContentBlockAnswer]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    usage: MessageUsage


class TokenCount(AnswerDocument):
    input_tokens: int


class MessagesErrorDetail(AnswerDocument):
    type: str
    message: str


class MessagesErrorAnswer(AnswerDocument):
    type: Literal["error"]
    error: MessagesErrorDetail
    request_id: str
