"""The items of a response's output while they are written: their events and their documents."""

from __future__ import annotations

from typing import Any, ClassVar

from ..formats.custom_input import CustomInput
from ..formats.speech import Call, Piece
from .events import event_head
from .hidden_reasoning import write_hidden

Event = tuple[str, dict[str, Any]]


class OutputItem:
    """An item at ``index`` of the output. ``delta`` is the kind of the events that bring its text,
    and ``head`` their bytes up to the text.
    """

    prefix: ClassVar[str]
    delta: ClassVar[str]
    constants: ClassVar[dict[str, Any]] = {}

    def __init__(self, index: int, key: str) -> None:
        self.index = index
        self.id = f"{self.prefix}_{key}_{index}"
        self.status = "in_progress"
        self.place: dict[str, Any] = {"item_id": self.id, "output_index": index, **self.constants}
        self.head = event_head(self.delta, self.place) + b',"delta":'
        self._texts: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self._texts)

    def takes(self, piece: Piece) -> bool:
        """Whether ``piece`` belongs to this item."""
        raise NotImplementedError

    def push(self, text: str) -> str:
        """Takes the next raw text; returns the text of its delta."""
        self._texts.append(text)
        return text

    def finish(self) -> str:
        """Text for a last delta."""
        return ""

    def is_complete(self) -> bool:
        """Whether the item is complete at its end."""
        return True

    def opened(self) -> list[Event]:
        return [("response.output_item.added", self._item())]

    def closed(self) -> list[Event]:
        return [("response.output_item.done", self._item())]

    def document(self) -> dict[str, Any]:
        raise NotImplementedError

    def _item(self) -> dict[str, Any]:
        return {"output_index": self.index, "item": self.document()}


class PartItem(OutputItem):
    """An item whose text is its only content part."""

    done: ClassVar[str]

    def opened(self) -> list[Event]:
        return [*super().opened(), ("response.content_part.added", self._part(self.part("")))]

    def closed(self) -> list[Event]:
        text = self.text
        return [
            (self.done, {**self.place, "text": text}),
            ("response.content_part.done", self._part(self.part(text))),
            *super().closed(),
        ]

    def part(self, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def parts(self) -> list[dict[str, Any]]:
        return [] if self.status == "in_progress" else [self.part(self.text)]

    def _part(self, part: dict[str, Any]) -> dict[str, Any]:
        return {"item_id": self.id, "output_index": self.index, "content_index": 0, "part": part}


class SpokenItem(PartItem):
    """A message."""

    prefix = "msg"
    delta = "response.output_text.delta"
    done = "response.output_text.done"
    constants: ClassVar[dict[str, Any]] = {"content_index": 0, "logprobs": []}

    def takes(self, piece: Piece) -> bool:
        return piece.call is None and not piece.is_reasoning

    def part(self, text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def document(self) -> dict[str, Any]:
        fields = {"id": self.id, "type": "message", "status": self.status, "role": "assistant"}
        return {**fields, "content": self.parts()}


class ThoughtItem(PartItem):
    """Reasoning. ``encrypts``: its ``encrypted_content`` is asked for."""

    prefix = "rs"
    delta = "response.reasoning_text.delta"
    done = "response.reasoning_text.done"
    constants: ClassVar[dict[str, Any]] = {"content_index": 0}

    def __init__(self, index: int, key: str, encrypts: bool) -> None:
        super().__init__(index, key)
        self._encrypts = encrypts

    def takes(self, piece: Piece) -> bool:
        return piece.is_reasoning

    def part(self, text: str) -> dict[str, Any]:
        return {"type": "reasoning_text", "text": text}

    def document(self) -> dict[str, Any]:
        fields = {"id": self.id, "type": "reasoning", "status": self.status, "summary": []}
        hidden = write_hidden(self.text) if self._encrypts and self.status != "in_progress" else None
        return {**fields, "content": self.parts(), "encrypted_content": hidden}


class CallItem(OutputItem):
    """A call of a function."""

    prefix = "fc"
    delta = "response.function_call_arguments.delta"

    def __init__(self, index: int, key: str, call: Call) -> None:
        super().__init__(index, key)
        self.call = call

    def takes(self, piece: Piece) -> bool:
        return piece.call is self.call

    def is_complete(self) -> bool:
        return self.call.complete

    def closed(self) -> list[Event]:
        done = {**self.place, "name": self.call.name, "arguments": self.text}
        return [("response.function_call_arguments.done", done), *super().closed()]

    def document(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "function_call",
            "status": self.status,
            "call_id": self.call.id,
            "name": self.call.name,
            "arguments": self.text,
        }


class CustomItem(CallItem):
    """A call of a custom tool."""

    prefix = "ctc"
    delta = "response.custom_tool_call_input.delta"

    def __init__(self, index: int, key: str, call: Call) -> None:
        super().__init__(index, key, call)
        self._input = CustomInput()

    def push(self, text: str) -> str:
        return super().push(self._input.push(text))

    def finish(self) -> str:
        return super().push(self._input.finish())

    def closed(self) -> list[Event]:
        done = {**self.place, "input": self.text}
        return [("response.custom_tool_call_input.done", done), *OutputItem.closed(self)]

    def document(self) -> dict[str, Any]:
        fields = {"id": self.id, "type": "custom_tool_call", "status": self.status}
        return {**fields, "call_id": self.call.id, "name": self.call.name, "input": self.text}
