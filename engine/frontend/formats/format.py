"""The interface of a format of tool calls, and the steps that several formats share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Protocol

from .lark import Lark
from .reader import SPACE, Reader, Steps
from .speech import Speech

Tools = dict[str, dict[str, Any]]  # name of a function -> JSON schema of its parameters


class ToolFormat(Protocol):
    """The form in which one family of models writes tool calls.

    ``openings`` begin a call or a section of calls. ``markers`` are all tags of the format; they
    must reach the parser even if they are special tokens. ``id_length`` is the length of call ids
    that the chat template accepts, 0 for any.
    """

    openings: ClassVar[tuple[str, ...]]
    markers: ClassVar[tuple[str, ...]]
    id_length: ClassVar[int]

    def __init__(self, tools: Tools) -> None: ...

    def read(self, reader: Reader, speech: Speech) -> Steps[bool]:
        """Reads the calls after an opening, which is pinned. False if they are none; the caller
        then rewinds.
        """

    def write(self, lark: Lark, names: Iterable[str], many: bool) -> str:
        """The grammar expression of a call of one of the functions ``names``, or of ``many``."""


def section(
    reader: Reader, speech: Speech, call: tuple[str, Callable[[Reader, Speech], Steps[bool]]], end: str
) -> Steps[bool]:
    """Reads the calls of a section, after its opening and up to ``end``. ``call`` is the tag that
    opens a call and the function that reads it. False if there is no call.
    """
    tag, read = call
    num_calls = 0
    while not speech.full:
        pin = reader.pin()
        yield from reader.skip(SPACE)
        if not ((yield from reader.take(tag)) and (yield from read(reader, speech))):
            if num_calls == 0:
                return False
            reader.rewind(pin)
            yield from optional(reader, end)
            return True
        num_calls += 1
    return True


def close(reader: Reader, speech: Speech, tag: str, others: tuple[str, ...] = ()) -> Steps[None]:
    """Moves past the closing tag of the last call, and past unmatched brackets before it. If the
    call broke off, the text before the tag, or before one of ``others``, becomes content.
    """
    pin = reader.pin()
    yield from reader.skip(SPACE + "}]")
    if (yield from reader.take(tag)) or not (yield from reader.peek()):
        reader.release()
        return
    reader.rewind(pin)
    if not speech.calls[-1].complete:
        yield from reader.scan((tag, *others), speech.content, past=False)
        yield from optional(reader, tag)


def opener(reader: Reader, speech: Speech, name: str, id: str | None = None) -> Callable[[], None]:
    """Opens a call and releases the pin, so that it stays a call."""

    def begin() -> None:
        speech.open_call(name, id)
        reader.release()

    return begin


def optional(reader: Reader, tag: str) -> Steps[bool]:
    """Moves past white space and ``tag`` if they come next, else not at all."""
    pin = reader.pin()
    yield from reader.skip(SPACE)
    if (yield from reader.take(tag)):
        reader.release()
        return True
    reader.rewind(pin)
    return False


def arguments(tools: Tools, name: str) -> dict[str, Any]:
    """The schema of a function's arguments, always an object. Without a schema it takes none."""
    return {**(tools[name] or {"properties": {}, "additionalProperties": False}), "type": "object"}


def repeated(call: str, between: str, many: bool) -> str:
    return f"{call} ({between} {call})*" if many else call
