"""A case: a conversation, the answer that is right, and how an answer is judged."""

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
    """How an answer is judged: by its last ``number``, by its ``text`` as a whole, by the ``json``
    object it is, by the tool ``call`` it makes, or by the strings it ``contains``.
    """

    kind: CheckKind
    value: Any

    def passes(self, content: str, calls: list[tuple[str, str]]) -> bool:
        """``calls``: name and arguments (as JSON text) of the tool calls of the answer."""
        if self.kind == "call":
            return (
                len(calls) == 1
                and calls[0][0] == self.value["name"]
                and _parsed(calls[0][1]) == self.value["arguments"]
            )
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
    """``messages`` up to the one that is asked for, in the form of the chat API, and the ``answer``
    message.

    Earlier assistant messages that hold ``"learn": True`` are answers to learn from as well.
    ``thinking`` False: the template is told ``enable_thinking=False``.
    """

    family: str
    messages: tuple[Message, ...]
    answer: Message
    check: Check
    tools: tuple[Message, ...] = ()
    thinking: bool = True


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
    """JSON as the model writes it."""
    return json.dumps(value, ensure_ascii=False)
