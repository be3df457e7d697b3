"""A reply as the events and the document of /v1/messages."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from ..api.errors import ApiError
from ..formats.speech import Piece
from ..reply import Reply
from ..requests.earlier_calls import object_of
from .dialect import pieces_of
from .events import encode, event, event_head
from .messages_errors import messages_error

UNSIGNED = "unsigned"  # the signature of thinking, which clients want to be there
_PING = event("ping", {})


class ContentBlock:
    """A block at ``index`` of the content, as its first ``piece`` begins it."""

    def __init__(self, index: int, piece: Piece) -> None:
        self.call = piece.call
        self.is_reasoning = piece.is_reasoning
        if self.call is not None:
            kind, name = "input_json_delta", "partial_json"
        elif self.is_reasoning:
            kind, name = "thinking_delta", "thinking"
        else:
            kind, name = "text_delta", "text"
        delta = encode({"type": kind, name: ""})[: -len(b'""}')]
        self.head = event_head("content_block_delta", {"index": index}) + b',"delta":' + delta
        self._texts: list[str] = []

    def takes(self, piece: Piece) -> bool:
        return piece.call is self.call and piece.is_reasoning == self.is_reasoning

    def push(self, text: str) -> None:
        self._texts.append(text)

    def document(self) -> dict[str, Any]:
        text = "".join(self._texts)
        if self.call is not None:
            return {
                "type": "tool_use",
                "id": self.call.id,
                "name": self.call.name,
                "input": object_of(text) if text else {},
            }
        if self.is_reasoning:
            return {"type": "thinking", "thinking": text, "signature": UNSIGNED if text else ""}
        return {"type": "text", "text": text}


class MessageStory:
    """The narrator of one message. Text, reasoning and calls become blocks in their order."""

    def __init__(self, reply: Reply) -> None:
        self._reply = reply
        self._generation = reply.generations[0]
        self._key = reply.outline.id.partition("-")[2]
        self._blocks: list[ContentBlock] = []
        self._open = False

    def opening(self) -> bytes:
        usage = self._usage() | {"output_tokens": 0}
        message = self._message([], None, usage)
        return event("message_start", {"message": message}) + _PING

    def tell(self, pieces: Sequence[Piece]) -> bytes:
        told: list[bytes] = []
        for _, group in groupby(pieces, lambda piece: (piece.is_reasoning, id(piece.call))):
            portion = list(group)
            if not (self._open and self._blocks[-1].takes(portion[0])):
                told += (self._close(), self._begin(portion[0]))
            block = self._blocks[-1]
            if text := "".join(piece.text for piece in portion):
                block.push(text)
                told.append(b"%s%s}}\n\n" % (block.head, encode(text)))
        return b"".join(told)

    def ending(self) -> bytes:
        told = self._close()
        delta = {"stop_reason": self._stop_reason(), "stop_sequence": self._stop_sequence()}
        told += event("message_delta", {"delta": delta, "usage": self._usage()})
        return told + event("message_stop", {})

    def failing(self, error: ApiError) -> bytes:
        return b"event: error\ndata: " + messages_error(error, self._key) + b"\n\n"

    def whole(self) -> dict[str, Any]:
        """The document of the finished reply."""
        self.tell(pieces_of(self._generation))
        content = [block.document() for block in self._blocks]
        return self._message(content, self._stop_reason(), self._usage())

    def _begin(self, piece: Piece) -> bytes:
        block = ContentBlock(len(self._blocks), piece)
        self._blocks.append(block)
        self._open = True
        fields = {"index": len(self._blocks) - 1, "content_block": block.document()}
        return event("content_block_start", fields)

    def _close(self) -> bytes:
        """Ends the block being written, if any."""
        if not self._open:
            return b""
        self._open = False
        fields: dict[str, Any] = {"index": len(self._blocks) - 1}
        told = event("content_block_stop", fields)
        if self._blocks[-1].is_reasoning:
            signature = {"type": "signature_delta", "signature": UNSIGNED}
            told = event("content_block_delta", fields | {"delta": signature}) + told
        return told

    def _stop_sequence(self) -> str | None:
        reason = self._generation.stop_reason
        return reason if isinstance(reason, str) else None

    def _stop_reason(self) -> str:
        if self._generation.finish == "length":
            return "max_tokens"
        if self._stop_sequence() is not None:
            return "stop_sequence"
        calls = [block.call for block in self._blocks if block.call is not None]
        return "tool_use" if calls and all(call.complete for call in calls) else "end_turn"

    def _message(
        self, content: list[dict[str, Any]], stop_reason: str | None, usage: dict[str, Any]
    ) -> dict[str, Any]:
        return {
            "id": f"msg_{self._key}",
            "type": "message",
            "role": "assistant",
            "model": self._reply.outline.model,
            "content": content,
            "stop_reason": stop_reason,
            "stop_sequence": None if stop_reason is None else self._stop_sequence(),
            "usage": usage,
        }

    def _usage(self) -> dict[str, Any]:
        """Prompt tokens are split into computed and cached ones."""
        usage = self._reply.usage()
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": usage["prompt_tokens"] - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": usage["completion_tokens"],
            "service_tier": "standard",
        }
