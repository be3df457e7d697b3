"""A case: a conversation, its right answer, and a check of answers."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Literal

Message = dict[str, Any]
CheckKind = Literal["number", "text", "json", "call", "contains"]

_NUMBER = re.compile(r"-?\d+")


@dataclass(frozen=True)
class Check:
    """Checks an answer: its last ``number``, its whole ``text``, the ``json`` object it is, the
    tool ``call`` it makes, or the strings it ``contains``.
    """

    kind: CheckKind
    value: Any

    def passes(self, content: str, calls: list[tuple[str, str]]) -> bool:
        """``calls``: name and arguments (as JSON text) of the answer's tool calls."""
        if self.kind == "call":
            wanted = self.value["name"], self.value["arguments"]
            return [(name, _parsed(arguments)) for name, arguments in calls] == [wanted]
        if calls:
            return False
        if self.kind == "number":
            numbers = _NUMBER.findall(content)
            return bool(numbers) and int(numbers[-1]) == self.value
        if self.kind == "text":
            return bool(content.strip() == self.value)
        if self.kind == "json":
            return bool(_parsed(content) == self.value)
        return all(
            re.search(rf"(?<!\w){re.escape(part)}(?!\w)", content, re.IGNORECASE) for part in self.value
        )


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None


@dataclass(frozen=True)
class Case:
    """``messages`` of the chat API up to the question, and the ``answer`` message.

    Earlier assistant messages with ``"learn": True`` are also answers to learn from. ``thinking``
    False: the template gets ``enable_thinking=False``. ``given`` is the start of the answer's
    content where a grammar writes it: it is not learned.
    """

    family: str
    messages: tuple[Message, ...]
    answer: Message
    check: Check
    tools: tuple[Message, ...] = ()
    thinking: bool = True
    given: str = ""


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str, reasoning: str | None = None, learn: bool = False) -> Message:
    message: Message = {"role": "assistant", "content": content}
    if reasoning is not None:
        message["reasoning_content"] = reasoning
    if learn:
        message["learn"] = True
    return message


def dumps(value: Any) -> str:
    """JSON in the model's format."""
    return json.dumps(value, ensure_ascii=False)
