"""The parts of an assistant message while it is generated: content, reasoning and tool calls that
the sink has not taken yet.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .custom_input import CustomInput
from .reader import NEWLINES, SPACE


@dataclass(slots=True)
class Call:
    """A tool call. ``fresh`` is the part of its arguments that has not been taken; ``told``: its
    name has been taken. ``input`` reads the text of a custom tool's call.
    """

    index: int
    id: str
    name: str
    fresh: str = ""
    told: bool = False
    complete: bool = False
    input: CustomInput | None = None


class Piece(NamedTuple):
    """A piece of text, in order: content, reasoning, or arguments of ``call``."""

    text: str
    call: Call | None = None
    is_reasoning: bool = False


@dataclass(slots=True)
class Delta:
    """The parts since the last ``take``. ``calls`` have the shape of streamed chunks. ``pieces``
    are all of it in the order of the text; the first piece of a call is empty.
    """

    content: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)


class Speech:
    """Collects pieces of text, which a parser has sorted. White space beside a tag is dropped.

    Without ``show_reasoning`` reasoning is dropped. With ``one_call`` it is ``full`` after the
    first call. ``id_length`` is the length of generated call ids, 0 for the usual form. Calls of
    the functions in ``custom`` are shown as those of custom tools.
    """

    __slots__ = (
        "_content",
        "_custom",
        "_id_length",
        "_one_call",
        "_pieces",
        "_reasoning",
        "_show_reasoning",
        "_space",
        "_untold",
        "calls",
    )

    def __init__(
        self,
        show_reasoning: bool = True,
        one_call: bool = False,
        id_length: int = 0,
        custom: frozenset[str] = frozenset(),
    ) -> None:
        self.calls: list[Call] = []
        self._content = ""
        self._reasoning = ""
        self._pieces: list[Piece] = []
        self._space = ""  # white space that is dropped if a tag follows
        self._untold: dict[int, Call] = {}
        self._show_reasoning = show_reasoning
        self._one_call = one_call
        self._id_length = id_length
        self._custom = custom

    @property
    def full(self) -> bool:
        """Whether the only call allowed has been made."""
        return self._one_call and bool(self.calls)

    @property
    def pending(self) -> bool:
        return bool(self._content or self._reasoning or self._untold)

    def content(self, text: str) -> None:
        text = self._space + text
        kept = text.rstrip(SPACE)
        self._space = text[len(kept) :]
        self._add_content(kept)

    def plain(self, text: str) -> None:
        """Adds content of a reply in which no tag can follow."""
        self._add_content(text)

    def reasoning(self, text: str) -> None:
        text = self._space + text
        kept = text.rstrip(NEWLINES)
        self._space = text[len(kept) :]
        self._add_reasoning(kept)

    def end_reasoning(self) -> None:
        self._space = ""

    def open_call(self, name: str, id: str | None = None) -> None:
        self._space = ""
        text = CustomInput() if name in self._custom else None
        call = Call(len(self.calls), id or self._new_id(), name, input=text)
        self.calls.append(call)
        self._untold[call.index] = call
        self._pieces.append(Piece("", call))

    def arguments(self, text: str) -> None:
        """Adds the next part of the last call's arguments."""
        call = self.calls[-1]
        call.fresh += text
        self._untold[call.index] = call
        self._pieces.append(Piece(text, call))

    def close_call(self) -> None:
        call = self.calls[-1]
        call.complete = True
        if call.input is not None:  # it may hold back text until now
            self._untold[call.index] = call

    def finish(self, reasoning: bool) -> None:
        """Ends the text, inside the ``reasoning`` or not. White space at the end belongs to the
        part before it, unless that is a call.
        """
        if reasoning:
            self._add_reasoning(self._space)
        elif not self.calls:
            self._add_content(self._space)
        self._space = ""

    def take(self) -> Delta:
        """All parts since the last ``take``."""
        calls = [_shown(call) for call in self._untold.values()]
        delta = Delta(self._content, self._reasoning, calls, self._pieces)
        self._content = self._reasoning = ""
        self._pieces = []
        self._untold.clear()
        return delta

    def _add_content(self, text: str) -> None:
        if text:
            self._content += text
            self._pieces.append(Piece(text))

    def _add_reasoning(self, text: str) -> None:
        if text and self._show_reasoning:
            self._reasoning += text
            self._pieces.append(Piece(text, is_reasoning=True))

    def _new_id(self) -> str:
        if self._id_length:
            return secrets.token_hex(self._id_length)[: self._id_length]
        return f"call_{secrets.token_hex(12)}"


def _shown(call: Call) -> dict[str, Any]:
    """The call's part of a chunk; only the first one has id and name."""
    if call.input is None:
        kind, given = "function", {"arguments": call.fresh}
    else:
        kind, given = "custom", {"input": call.input.push(call.fresh)}
        if call.complete:
            given["input"] += call.input.finish()
    shown: dict[str, Any] = {"index": call.index, kind: given}
    if not call.told:
        shown = {"index": call.index, "id": call.id, "type": kind, kind: {"name": call.name, **given}}
    call.fresh = ""
    call.told = True
    return shown
