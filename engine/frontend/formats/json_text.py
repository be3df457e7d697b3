"""JSON while it arrives: passes values on as they are written, and reads calls in object form."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from .reader import SPACE, Reader, Sink, Steps
from .speech import Speech

_STRUCTURE = re.compile(r'["{}\[\]]')
_STRING = re.compile(r'["\\]')
_SCALAR_END = re.compile(r"[,}\]\s]")
CLOSES = {"{": "}", "[": "]"}
ARGUMENTS = ("arguments", "parameters")


def _search(pattern: re.Pattern[str]) -> Any:
    def until(text: str, start: int) -> int:
        found = pattern.search(text, start)
        return found.start() if found else -1

    return until


_to_structure = _search(_STRUCTURE)
_in_string = _search(_STRING)
_to_scalar_end = _search(_SCALAR_END)


def decoded(text: str) -> Any:
    """The value of a JSON text. Raises ValueError if it is not valid JSON."""
    return msgspec.json.decode(text)


def value(reader: Reader, sink: Sink) -> Steps[bool]:
    """Passes on the JSON value at the cursor as it is written. True if it was complete: brackets
    matched and strings closed.
    """
    first = yield from reader.peek()
    if first == '"':
        return (yield from _string(reader, sink))
    if first not in CLOSES:
        return (yield from reader.run(_to_scalar_end, sink))
    open_brackets: list[str] = []
    while True:
        if not (yield from reader.run(_to_structure, sink)):
            return False
        char = yield from reader.peek()
        if char == '"':
            if not (yield from _string(reader, sink)):
                return False
            continue
        if char in CLOSES:
            open_brackets.append(char)
        elif CLOSES[open_brackets.pop()] != char:
            return False
        yield from _pass(reader, char, sink)
        if not open_brackets:
            return True


def _string(reader: Reader, sink: Sink) -> Steps[bool]:
    yield from _pass(reader, '"', sink)
    while True:
        if not (yield from reader.run(_in_string, sink)):
            return False
        char = yield from reader.peek()
        yield from _pass(reader, char, sink)
        if char == '"':
            return True
        escaped = yield from reader.peek()  # after a backslash no character ends the string
        if not escaped:
            return False
        yield from _pass(reader, escaped, sink)


def _pass(reader: Reader, literal: str, sink: Sink) -> Steps[None]:
    taken = yield from reader.take(literal)
    assert taken
    sink(literal)


class Quoted:
    """Passes text on as the inside of a JSON string, escaped as it arrives."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    def __call__(self, text: str) -> None:
        self._sink(msgspec.json.encode(text).decode()[1:-1])


def call_object(reader: Reader, speech: Speech) -> Steps[bool]:
    """Reads ``{"name": ..., "arguments": {...}}`` at the cursor, which is pinned, into a call.

    False if it is none; the caller then rewinds to its pin. Once the name is known and the
    arguments have begun it stays a call, whatever follows, and the pin is released.
    """
    return (yield from _CallObject(reader, speech).read())


class _CallObject:
    def __init__(self, reader: Reader, speech: Speech) -> None:
        self._reader = reader
        self._speech = speech
        self._name: str | None = None
        self._held: str | None = None  # arguments that came before the name or are not an object
        self._open = False

    def read(self) -> Steps[bool]:
        reader = self._reader
        if not (yield from reader.take("{")):
            return False
        first = True
        while True:
            yield from reader.skip(SPACE)
            if (yield from reader.take("}")):
                return self._end()
            if not first and not (yield from reader.take(",")):
                return self._end() if self._open else False  # complete but for a missing brace
            first = False
            yield from reader.skip(SPACE)
            if not (yield from self._member()):
                return self._open

    def _member(self) -> Steps[bool]:
        """Reads one ``"key": value``. False if it is not well-formed."""
        reader = self._reader
        key = yield from self._decoded()
        yield from reader.skip(SPACE)
        if not isinstance(key, str) or not (yield from reader.take(":")):
            return False
        yield from reader.skip(SPACE)
        may_begin = key in ARGUMENTS and self._name is not None and not self._open
        if may_begin and (yield from reader.peek()) == "{":
            self._begin()
            if not (yield from value(reader, self._speech.arguments)):
                return False
            self._speech.close_call()
            return True
        text = yield from self._text()
        if text is None:
            return False
        if key == "name":
            name = _or_none(text)
            self._name = name if isinstance(name, str) and name else None
        elif key in ARGUMENTS:
            self._held = text
        return True

    def _end(self) -> bool:
        """Opens and closes the call of the complete object, unless its arguments did so already."""
        if self._open:
            return True
        if self._name is None:
            return False
        self._begin()
        held = _or_none(self._held) if self._held is not None else {}
        # some models write the object of arguments as a string
        self._speech.arguments(held if isinstance(held, str) else self._held or "{}")
        self._speech.close_call()
        return True

    def _begin(self) -> None:
        assert self._name is not None
        self._speech.open_call(self._name)
        self._open = True
        self._reader.release()

    def _decoded(self) -> Steps[Any]:
        text = yield from self._text()
        return None if text is None else _or_none(text)

    def _text(self) -> Steps[str | None]:
        """The text of the next value, None if it is not well-formed."""
        parts: list[str] = []
        complete = yield from value(self._reader, parts.append)
        return "".join(parts) if complete else None


def _or_none(text: str) -> Any:
    try:
        return decoded(text)
    except ValueError:
        return None
