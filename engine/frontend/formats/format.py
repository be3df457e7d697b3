"""What a format of tool calls is, and the steps that several share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Protocol

from .lark import Lark
from .reader import SPACE, Reader, Steps
from .speech import Speech

Tools = dict[str, dict[str, Any]]  # name of a function -> JSON schema of its parameters


class ToolFormat(Protocol):
    """How one family of models writes tool calls.

    ``openings`` begin a call or a section of calls; ``markers`` are all tags of the format, which
    must reach the parser also where the tokenizer calls them special. ``id_length`` is that of the
    ids the chat template accepts, 0 for any.
    """

    openings: ClassVar[tuple[str, ...]]
    markers: ClassVar[tuple[str, ...]]
    id_length: ClassVar[int]

    def __init__(self, tools: Tools) -> None: ...

    def read(self, reader: Reader, speech: Speech) -> Steps[bool]:
        """Behind an opening and a pin: reads what it opens. False where it is no call, which the
        caller then rewinds.
        """

    def write(self, lark: Lark, names: Iterable[str], many: bool) -> str:
        """The expression of a call of one of the functions ``names``, or of several calls."""


def section(
    reader: Reader, speech: Speech, call: tuple[str, Callable[[Reader, Speech], Steps[bool]]], end: str
) -> Steps[bool]:
    """Behind the opening of a section: its calls, up to its end. ``call`` is the tag that opens one
    and what reads it; False where not even one comes.
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


def close(reader: Reader, speech: Speech, tag: str) -> Steps[None]:
    """Behind a call: moves behind its closing tag. A call that broke off keeps what stands before
    the tag in its arguments.
    """
    if not speech.calls[-1].complete:
        yield from reader.scan((tag,), speech.arguments)
        return
    yield from optional(reader, tag)


def optional(reader: Reader, tag: str) -> Steps[bool]:
    """Moves behind white space and ``tag`` if they come next, else not at all."""
    pin = reader.pin()
    yield from reader.skip(SPACE)
    if (yield from reader.take(tag)):
        reader.release()
        return True
    reader.rewind(pin)
    return False


def arguments(tools: Tools, name: str) -> dict[str, Any]:
    """The schema of a function's arguments: an object; one without schema takes none."""
    return {**(tools[name] or {"properties": {}, "additionalProperties": False}), "type": "object"}


def repeated(call: str, between: str, many: bool) -> str:
    return f"{call} ({between} {call})*" if many else call
