"""Builds a chat's messages from the items or blocks of another dialect. Items of one earlier answer
become one message again.
"""

from __future__ import annotations

from typing import Any

from ..api.errors import bad_request
from ..api.schemas import ContentPart
from ..requests.conversation import TEXT_PARTS


def text_of(content: str | list[ContentPart] | None, place: str, field: str) -> str:
    """The text of ``content``, the ``field`` of the item at ``place``, as a chat joins it. Raises
    ApiError for any other part.
    """
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(_part_text(part, f"{place}.{field}[{index}]") for index, part in enumerate(content))


def _part_text(part: ContentPart, place: str) -> str:
    refusal = (part.model_extra or {}).get("refusal")
    if part.type == "refusal" and isinstance(refusal, str):
        return refusal
    if part.text is None or part.type not in (*TEXT_PARTS, "reasoning_text", "summary_text"):
        raise bad_request(f"{place}: only text parts are supported (got {part.type[:80]!r})", place)
    return part.text


class ChatTurns:
    """``messages`` of a chat, and the ``places`` in the body that they come from.

    The parts of one reply are reasoning, content and calls; content may come after calls too. They
    join until ``close``, or until a part comes that must begin another reply.
    """

    def __init__(self) -> None:
        self.places: list[str] = []
        self._messages: list[dict[str, Any]] = []
        self._open = False
        # Parts of the last reply, joined only once, since there may be thousands.
        self._content: list[str] = []
        self._reasoning: list[str] = []

    @property
    def messages(self) -> list[dict[str, Any]]:
        self._join()
        return self._messages

    def close(self) -> None:
        self._open = False

    def add(self, role: str, text: str, place: str) -> None:
        """A message of its own."""
        self._append({"role": role, "content": text}, place)
        self._open = False

    def result(self, call_id: str, text: str, place: str) -> None:
        self._append({"role": "tool", "tool_call_id": call_id, "content": text}, place)
        self._open = False

    def reasoning(self, text: str, place: str) -> None:
        turn = self._turn(place)
        if self._content or "tool_calls" in turn:
            self._begin(place)
        self._reasoning.append(text)

    def content(self, text: str, place: str, joins: bool) -> None:
        """Content of a reply. ``joins``: it may follow other content, after a line break."""
        turn = self._turn(place)
        if self._content and "tool_calls" not in turn:
            if joins:
                self._content.append("\n")
            else:
                self._begin(place)
        self._content.append(text)

    def call(self, call_id: str, name: str, arguments: str | dict[str, Any], place: str) -> None:
        function = {"name": name, "arguments": arguments}
        call = {"id": call_id, "type": "function", "function": function}
        self._turn(place).setdefault("tool_calls", []).append(call)

    def _turn(self, place: str) -> dict[str, Any]:
        return self._messages[-1] if self._open else self._begin(place)

    def _begin(self, place: str) -> dict[str, Any]:
        self._append({"role": "assistant", "content": None}, place)
        self._open = True
        return self._messages[-1]

    def _append(self, message: dict[str, Any], place: str) -> None:
        self._join()
        self._messages.append(message)
        self.places.append(place)

    def _join(self) -> None:
        """Writes the collected parts of the last reply into its message."""
        if self._reasoning:
            self._messages[-1]["reasoning"] = "\n".join(self._reasoning)
        if self._content:
            self._messages[-1]["content"] = "".join(self._content)
        self._reasoning, self._content = [], []
