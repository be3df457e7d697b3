"""What an assistant message consists of while it is being generated: content, reasoning and tool
calls, not yet taken by its sink.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Any

from .reader import NEWLINES, SPACE


@dataclass(slots=True)
class Call:
    """A tool call. ``fresh`` is the part of its arguments that has not been taken; ``told`` whether
    its name has.
    """

    index: int
    id: str
    name: str
    fresh: str = ""
    told: bool = False
    complete: bool = False


@dataclass(slots=True)
class Delta:
    """What was said since the last time it was taken. ``calls`` are in the shape of streamed
    chunks.
    """

    content: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)


class Speech:
    """Told by a parser what each piece of text is. White space beside a tag is framing and is
    dropped.

    ``show_reasoning`` False drops reasoning. ``one_call`` True makes it ``full`` with the first
    call. ``id_length`` is that of generated call ids, 0 for the usual form.
    """

    __slots__ = (
        "_content",
        "_id_length",
        "_one_call",
        "_reasoning",
        "_show_reasoning",
        "_space",
        "_untold",
        "calls",
    )

    def __init__(self, show_reasoning: bool = True, one_call: bool = False, id_length: int = 0) -> None:
        self.calls: list[Call] = []
        self._content = ""
        self._reasoning = ""
        self._space = ""  # white space that a tag after it would make framing
        self._untold: dict[int, Call] = {}
        self._show_reasoning = show_reasoning
        self._one_call = one_call
        self._id_length = id_length

    @property
    def full(self) -> bool:
        """No call may follow the last one."""
        return self._one_call and bool(self.calls)

    @property
    def pending(self) -> bool:
        return bool(self._content or self._reasoning or self._untold)

    def content(self, text: str) -> None:
        text = self._space + text
        kept = text.rstrip(SPACE)
        self._space = text[len(kept) :]
        self._content += kept

    def plain(self, text: str) -> None:
        """Content behind which no tag can come."""
        self._content += text

    def reasoning(self, text: str) -> None:
        text = self._space + text
        kept = text.rstrip(NEWLINES)
        self._space = text[len(kept) :]
        if self._show_reasoning:
            self._reasoning += kept

    def end_reasoning(self) -> None:
        self._space = ""

    def open_call(self, name: str, id: str | None = None) -> None:
        self._space = ""
        call = Call(len(self.calls), id or self._new_id(), name)
        self.calls.append(call)
        self._untold[call.index] = call

    def arguments(self, text: str) -> None:
        """The next part of the last call's arguments."""
        call = self.calls[-1]
        call.fresh += text
        self._untold[call.index] = call

    def close_call(self) -> None:
        self.calls[-1].complete = True

    def finish(self, reasoning: bool) -> None:
        """The text has ended, ``reasoning``: within the reasoning. White space at the end belongs
        to what it follows, but for a call.
        """
        space, self._space = self._space, ""
        if reasoning:
            self._reasoning += space if self._show_reasoning else ""
        elif not self.calls:
            self._content += space

    def take(self) -> Delta:
        """Everything since the last call."""
        delta = Delta(self._content, self._reasoning, [_shown(call) for call in self._untold.values()])
        self._content = self._reasoning = ""
        self._untold.clear()
        return delta

    def _new_id(self) -> str:
        return (
            secrets.token_hex(self._id_length)[: self._id_length]
            if self._id_length
            else f"call_{secrets.token_hex(12)}"
        )


def _shown(call: Call) -> dict[str, Any]:
    """The call's part of a chunk: id and name the first time."""
    function = {"arguments": call.fresh} if call.told else {"name": call.name, "arguments": call.fresh}
    shown: dict[str, Any] = (
        {"index": call.index} if call.told else {"index": call.index, "id": call.id, "type": "function"}
    )
    call.fresh, call.told = "", True
    return {**shown, "function": function}
