"""A reply as the events and the document of /v1/responses."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from ..api.errors import ApiError
from ..api.schemas import ChatRequest
from ..formats.speech import Piece
from ..reply import Reply
from .dialect import pieces_of
from .events import encode, event
from .responses_body import CustomTool, FunctionTool, ResponsesRequest
from .responses_items import CallItem, CustomItem, Event, OutputItem, SpokenItem, ThoughtItem

DONE = b"data: [DONE]\n\n"


class ResponseStory:
    """The narrator of one response. Text, reasoning and calls become items in their order."""

    def __init__(self, body: ResponsesRequest, chat: ChatRequest, reply: Reply) -> None:
        self._body = body
        self._reply = reply
        self._generation = reply.generations[0]
        self._key = reply.outline.id.partition("-")[2]
        self._custom = body.custom_names
        self._sequence = 0
        self._item: OutputItem | None = None  # the one being written
        self._output: list[dict[str, Any]] = []
        self._constant = _constant_fields(body, chat)

    def opening(self) -> bytes:
        response = self._response("in_progress")
        return self._told(
            [("response.created", {"response": response}), ("response.in_progress", {"response": response})]
        )

    def tell(self, pieces: Sequence[Piece]) -> bytes:
        told: list[bytes] = []
        for _, group in groupby(pieces, lambda piece: (piece.is_reasoning, id(piece.call))):
            portion = list(group)
            item = self._item
            if item is None or not item.takes(portion[0]):
                told.append(self._close("completed"))
                item = self._open(portion[0])
                told.append(self._told(item.opened()))
            told.append(self._delta(item, item.push("".join(piece.text for piece in portion))))
        return b"".join(told)

    def ending(self) -> bytes:
        finish = self._generation.finish
        status = {"stop": "completed", "length": "incomplete"}.get(finish or "", "failed")
        told = [] if self._item is not None or self._output else [self.tell([Piece("")])]
        told.append(self._close("completed" if status == "completed" else "incomplete"))
        told.append(self._told([(f"response.{status}", {"response": self._response(status)})]))
        return b"".join([*told, DONE])

    def failing(self, error: ApiError) -> bytes:
        response = self._response("failed") | {"error": _error(error.detail)}
        return self._told([("response.failed", {"response": response})]) + DONE

    def whole(self) -> dict[str, Any]:
        """The document of the finished reply."""
        self.tell(pieces_of(self._generation))
        self.ending()
        finish = self._generation.finish
        return self._response({"stop": "completed", "length": "incomplete"}.get(finish or "", "failed"))

    def _open(self, piece: Piece) -> OutputItem:
        index = len(self._output)
        if piece.call is not None:
            kind = CustomItem if piece.call.name in self._custom else CallItem
            self._item = kind(index, self._key, piece.call)
        elif piece.is_reasoning:
            self._item = ThoughtItem(index, self._key, self._body.encrypts)
        else:
            self._item = SpokenItem(index, self._key)
        return self._item

    def _close(self, status: str) -> bytes:
        """Ends the item being written, if any."""
        item = self._item
        if item is None:
            return b""
        told = self._delta(item, item.finish())
        item.status = status if item.is_complete() else "incomplete"
        told += self._told(item.closed())
        self._output.append(item.document())
        self._item = None
        return told

    def _delta(self, item: OutputItem, text: str) -> bytes:
        if not text:
            return b""
        number = self._sequence
        self._sequence += 1
        return b'%s%s,"sequence_number":%d}\n\n' % (item.head, encode(text), number)

    def _told(self, events: Iterable[Event]) -> bytes:
        told = []
        for kind, fields in events:
            told.append(event(kind, {**fields, "sequence_number": self._sequence}))
            self._sequence += 1
        return b"".join(told)

    def _response(self, status: str) -> dict[str, Any]:
        ended = status != "in_progress"
        outline, sampling = self._reply.outline, self._generation.submit.sampling
        cut = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            "id": f"resp_{self._key}",
            "object": "response",
            "created_at": outline.created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "error": _error("The request was aborted") if status == "failed" else None,
            "incomplete_details": cut,
            "model": outline.model,
            "output": list(self._output),
            "usage": self._usage() if ended else None,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            **self._constant,
        }

    def _usage(self) -> dict[str, Any]:
        usage = self._reply.usage()
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": usage["completion_tokens_details"],
            "total_tokens": usage["total_tokens"],
        }


def _error(message: str) -> dict[str, Any]:
    return {"code": "server_error", "message": message}


def _constant_fields(body: ResponsesRequest, chat: ChatRequest) -> dict[str, Any]:
    """The fields of a response that repeat the request."""
    sent = body.model_extra or {}
    text = body.text.model_dump(by_alias=True, exclude_none=True) if body.text is not None else {}
    reasoning = body.reasoning
    choice = body.tool_choice or "auto"
    return {
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": sent.get("max_tool_calls"),
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "prompt_cache_key": sent.get("prompt_cache_key"),
        "reasoning": {"effort": None if reasoning is None else reasoning.effort, "summary": None},
        "safety_identifier": sent.get("safety_identifier"),
        "service_tier": "default",
        "store": False,
        "background": False,
        "top_logprobs": 0,
        "presence_penalty": chat.presence_penalty or 0.0,
        "frequency_penalty": chat.frequency_penalty or 0.0,
        "text": {"format": {"type": "text"}} | text,
        "tool_choice": choice if isinstance(choice, str) else choice.model_dump(exclude_unset=True),
        "tools": [_tool(tool) for tool in body.tools or ()],
        "truncation": body.truncation or "disabled",
        "user": sent.get("user"),
    }


def _tool(tool: FunctionTool | CustomTool) -> dict[str, Any]:
    if isinstance(tool, CustomTool):
        return tool.model_dump(exclude_unset=True)
    return tool.model_dump(include={"type", "name", "description", "parameters", "strict"})
