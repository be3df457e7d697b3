"""JSON while it arrives: passes values on as they are written.

All that is passed on is the start of a valid JSON text, wherever the reply breaks off: a value ends
at the first character that cannot continue it. Three slips of models are mended on the way: control
characters inside strings are escaped, a backslash that escapes nothing is doubled, and a comma
before a closing bracket is left out.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from .reader import SPACE, Reader, Sink, Steps

_IN_STRING = re.compile(r'["\\\x00-\x1f]')
_NO_SPACE = re.compile(r"[^ \t\r\n]")
_NO_DIGIT = re.compile(r"[^0-9]")
_HEX = frozenset("0123456789abcdefABCDEF")
_DIGITS = frozenset("0123456789")
_ESCAPES = frozenset('"\\/bfnrt')
_LITERALS = {"t": "true", "f": "false", "n": "null"}
_CLOSES = {"{": "}", "[": "]"}
# Places within a value: what may come next.
_VALUE, _ITEM, _KEY, _MEMBER, _COLON, _NEXT = range(6)
_MAY_CLOSE = frozenset((_ITEM, _MEMBER, _NEXT))


def _search(pattern: re.Pattern[str]) -> Any:
    def until(text: str, start: int) -> int:
        found = pattern.search(text, start)
        return found.start() if found else -1

    return until


_in_string = _search(_IN_STRING)
_to_black = _search(_NO_SPACE)
_to_no_digit = _search(_NO_DIGIT)


def decoded(text: str) -> Any:
    """The value of a JSON text. Raises ValueError or RecursionError if there is none."""
    return msgspec.json.decode(text)


def value(reader: Reader, sink: Sink) -> Steps[bool]:
    """Passes on the JSON value at the cursor as it is written, up to the first character that
    cannot continue it. True if the value is complete.
    """
    closers: list[str] = []
    place = _VALUE
    while True:
        char = reader.glance() or (yield from reader.peek())
        if closers and char and char in SPACE:
            yield from reader.run(_to_black, sink)
            char = reader.glance()
        if place in _MAY_CLOSE and char == closers[-1]:
            closers.pop()
            _pass(reader, char, sink)
        elif place == _NEXT:
            if char != ",":
                return False
            yield from _comma(reader, closers[-1], sink)
            place = _KEY if closers[-1] == "}" else _VALUE
            if (yield from reader.peek()) == closers[-1]:
                place = _NEXT
            continue
        elif place == _COLON:
            if char != ":":
                return False
            _pass(reader, char, sink)
            place = _VALUE
            continue
        elif place in (_KEY, _MEMBER):
            if char != '"' or not (yield from _string(reader, sink)):
                return False
            place = _COLON
            continue
        elif char in _CLOSES:
            closers.append(_CLOSES[char])
            _pass(reader, char, sink)
            place = _MEMBER if char == "{" else _ITEM
            continue
        elif not (yield from _scalar(reader, char, sink)):
            return False
        if not closers:
            return True
        place = _NEXT


def _comma(reader: Reader, closer: str, sink: Sink) -> Steps[None]:
    """Moves past a comma and the space behind it; leaves the comma out before ``closer``."""
    reader.step(1)
    space = yield from reader.skip(SPACE)
    reader.commit()
    sink(space if (yield from reader.peek()) == closer else "," + space)


def _scalar(reader: Reader, first: str, sink: Sink) -> Steps[bool]:
    if first == '"':
        return (yield from _string(reader, sink))
    if first in _LITERALS:
        for expected in _LITERALS[first]:
            if (yield from reader.peek()) != expected:
                return False
            _pass(reader, expected, sink)
        return True
    return (yield from _number(reader, sink))


def _number(reader: Reader, sink: Sink) -> Steps[bool]:
    yield from _one_of(reader, "-", sink)
    if not (yield from _one_of(reader, "0", sink)) and not (yield from _digits(reader, sink)):
        return False
    if (yield from _one_of(reader, ".", sink)) and not (yield from _digits(reader, sink)):
        return False
    if (yield from _one_of(reader, "eE", sink)):
        yield from _one_of(reader, "+-", sink)
        return (yield from _digits(reader, sink))
    return True


def _digits(reader: Reader, sink: Sink) -> Steps[bool]:
    if (yield from reader.peek()) not in _DIGITS:
        return False
    yield from reader.run(_to_no_digit, sink)
    return True


def _one_of(reader: Reader, chars: str, sink: Sink) -> Steps[bool]:
    char = reader.glance() or (yield from reader.peek())
    if not char or char not in chars:
        return False
    _pass(reader, char, sink)
    return True


def _string(reader: Reader, sink: Sink) -> Steps[bool]:
    _pass(reader, '"', sink)
    while True:
        if not (yield from reader.run(_in_string, sink)):
            return False
        char = reader.glance()
        if char == '"':
            _pass(reader, char, sink)
            return True
        if char == "\\":
            yield from _escape(reader, sink)
        else:
            sink(encoded(char)[1:-1])
            reader.step(1)


def _escape(reader: Reader, sink: Sink) -> Steps[None]:
    """Passes on an escape, or its backslash alone, doubled, if it is none."""
    text = yield from reader.ahead(2)
    if text[1:] == "u":
        text = yield from reader.ahead(6)
        known = _HEX.issuperset(text[2:])
    else:
        known = _ESCAPES.issuperset(text[1:])
    sink(text if known else "\\\\")
    reader.step(len(text) if known else 1)


def _pass(reader: Reader, char: str, sink: Sink) -> None:
    """Passes on the character that ``peek`` has shown."""
    sink(char)
    reader.step(1)


def collected(reader: Reader) -> Steps[tuple[str, bool]]:
    """The text of the JSON value at the cursor, and whether it is complete."""
    parts: list[str] = []
    complete = yield from value(reader, parts.append)
    return "".join(parts), complete


def encoded(text: str) -> str:
    """``text`` as a JSON string."""
    return msgspec.json.encode(text).decode()


class Quoted:
    """Passes text on as the inside of a JSON string, escaped as it arrives."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    def __call__(self, text: str) -> None:
        self._sink(encoded(text)[1:-1])


def decoded_or_none(text: str) -> Any:
    """The value of a JSON text, None if there is none."""
    try:
        return decoded(text)
    except (ValueError, RecursionError):
        return None


def as_object(text: str) -> str | None:
    """The object of arguments that the JSON value ``text`` stands for, as text: itself, the object
    written in a string, or an empty one for null and an empty string. None for any other value.
    """
    if text.startswith("{"):
        return text
    if text == "null":
        return "{}"
    inner = decoded_or_none(text)
    if not isinstance(inner, str):
        return None
    start, complete = start_of_object(inner)
    return start if complete else None


def start_of_object(text: str) -> tuple[str, bool]:
    """The longest start of ``text`` that starts a JSON object, and whether the object is all of it.
    An empty text is an empty object.
    """
    text = text.strip(SPACE)
    if not text:
        return "{}", True
    if not text.startswith("{"):
        return "", False
    reader = Reader()
    reader.feed(text)
    reader.ended = True
    steps = collected(reader)
    try:
        next(steps)
    except StopIteration as stop:
        start, complete = stop.value
        return start, complete and reader.position == len(text)
    raise AssertionError("a reader whose text has ended waited for more")
