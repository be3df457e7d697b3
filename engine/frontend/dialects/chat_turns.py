"""Puts a chat's messages together from the items or blocks of another dialect. What the server has
answered as several of them is one message again.
"""

from __future__ import annotations

from typing import Any

from ..api.errors import bad_request
from ..api.schemas import ContentPart
from ..requests.conversation import TEXT_PARTS


def text_of(content: str | list[ContentPart] | None, place: str) -> str:
    """The text of ``content``, as a chat joins it. Raises ApiError for any other part."""
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(_part_text(part, f"{place}[{index}]") for index, part in enumerate(content))


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
        self.messages: list[dict[str, Any]] = []
        self.places: list[str] = []
        self._open = False

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
        if turn.keys() > {"role", "content", "reasoning"} or turn["content"] is not None:
            turn = self._begin(place)
        turn["reasoning"] = f"{turn['reasoning']}\n{text}" if "reasoning" in turn else text

    def content(self, text: str, place: str, joins: bool) -> None:
        """Content of a reply. ``joins``: it may follow other content, after a line break."""
        turn = self._turn(place)
        before = turn["content"]
        if before is not None and "tool_calls" not in turn:
            if not joins:
                self._begin(place)["content"] = text
                return
            before += "\n"
        turn["content"] = (before or "") + text

    def call(self, call_id: str, name: str, arguments: str | dict[str, Any], place: str) -> None:
        function = {"name": name, "arguments": arguments}
        call = {"id": call_id, "type": "function", "function": function}
        self._turn(place).setdefault("tool_calls", []).append(call)

    def _turn(self, place: str) -> dict[str, Any]:
        return self.messages[-1] if self._open else self._begin(place)

    def _begin(self, place: str) -> dict[str, Any]:
        self._append({"role": "assistant", "content": None}, place)
        self._open = True
        return self.messages[-1]

    def _append(self, message: dict[str, Any], place: str) -> None:
        self.messages.append(message)
        self.places.append(place)
