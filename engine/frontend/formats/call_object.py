"""Calls in object form: ``{"name": ..., "arguments": {...}}``, and arguments alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .json_text import as_object, collected, decoded_or_none, start_of_object, value
from .reader import MAX_HEAD, SPACE, Reader, Steps
from .speech import Speech

ARGUMENTS = ("arguments", "parameters")


def call_object(reader: Reader, speech: Speech) -> Steps[bool]:
    """Reads ``{"name": ..., "arguments": {...}}`` at the cursor, which is pinned, into a call.

    False if it is none; the caller then rewinds to its pin. Once the name is known and the
    arguments have begun, or the text has ended, it stays a call, and the pin is released.
    """
    return (yield from _CallObject(reader, speech).read())


def call_arguments(reader: Reader, speech: Speech, begin: Callable[[], None], end: str) -> Steps[bool]:
    """Reads the arguments at the cursor, which is pinned, into the call that ``begin`` opens. False
    if they are none; the caller then rewinds. No arguments before ``end`` are an empty object.
    """
    yield from reader.skip(SPACE)
    first = yield from reader.peek()
    if first == "{":
        begin()
        if (yield from value(reader, speech.arguments)):
            speech.close_call()
        return True
    if end.startswith((yield from reader.ahead(len(end)))):
        text, complete = "{}" if first else "", bool(first)
    else:
        text, complete = yield from collected(reader)
    given = as_object(text) if complete else None
    if not complete and not (yield from reader.peek()):
        given = _begun(text)
    if given is None:
        return False
    begin()
    speech.arguments(given)
    if complete:
        speech.close_call()
    return True


def _begun(text: str) -> str | None:
    """The start of the arguments in ``text``, a JSON value that breaks off; None if it can become
    none.
    """
    if "null".startswith(text):
        return ""
    if not text.startswith('"'):
        return None
    for end in range(len(text), max(0, len(text) - 6), -1):  # an escape may be cut
        inner = decoded_or_none(text[:end] + '"')
        if isinstance(inner, str):
            return (start_of_object(inner)[0] or None) if inner.strip(SPACE) else ""
    return None


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
            was_open = self._open
            pin = reader.pin() if was_open else 0
            yield from reader.skip(SPACE)
            if (yield from reader.take("}")):
                return self._end()
            well_formed = first or (yield from reader.take(","))
            if well_formed:
                yield from reader.skip(SPACE)
                well_formed = yield from self._member()
            if not well_formed:
                if was_open:  # the call is complete but for a brace; the rest is no part of it
                    reader.rewind(pin)
                return self._open or (yield from self._break_off())
            first = False

    def _member(self) -> Steps[bool]:
        """Reads one ``"key": value``. False if it is not well-formed."""
        reader = self._reader
        text, complete = yield from collected(reader)
        key = decoded_or_none(text) if complete else None
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
        text, complete = yield from collected(reader)
        if key in ARGUMENTS:
            self._held = text
        elif key == "name" and complete:
            self._name = _name(decoded_or_none(text))
        return complete

    def _end(self) -> bool:
        """Opens and closes the call of the complete object, unless its arguments did so already."""
        if self._open:
            self._reader.release()
            return True
        given = as_object(self._held) if self._held is not None else "{}"
        if self._name is None or given is None:
            return False
        self._begin()
        self._speech.arguments(given)
        self._speech.close_call()
        return True

    def _break_off(self) -> Steps[bool]:
        """Opens the call if the text has ended after its name."""
        if self._name is None or (yield from self._reader.peek()):
            return False
        if self._held is not None and self._held.startswith("{"):
            return self._end()  # complete but for a brace
        begun = _begun(self._held or "")
        if begun is None:
            return False
        self._begin()
        self._speech.arguments(begun)
        return True

    def _begin(self) -> None:
        assert self._name is not None
        self._speech.open_call(self._name)
        self._open = True
        self._reader.release()


def _name(given: Any) -> str | None:
    return given if isinstance(given, str) and 0 < len(given) <= MAX_HEAD else None
