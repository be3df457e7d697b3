"""Calls whose arguments are pairs of key and value between tags. Strings are written as they are,
other values as JSON.

The function's schema decides which values are strings: if it allows a string, a value is one,
unless it is a null, an array or an object that the schema also allows. Without a schema, a value
that is valid JSON is taken as JSON. If the tag of a value gives its kind, that takes precedence.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import msgspec

from .format import Tools, close, opener, optional
from .json_text import Quoted, collected, encoded
from .parameters import TEXT, Parameters
from .reader import SPACE, Reader, Steps
from .speech import Speech

_STRING = {"type": "string"}
_NAME = re.compile(r"[\w.:/-]+")


@dataclass(frozen=True, slots=True)
class Markup:
    """The tags of a format. ``key`` and ``key_end`` enclose a key, ``value`` (which may be empty)
    and ``value_end`` its value; ``end`` ends a call. ``padded``: a line break follows ``key_end``
    and precedes ``value_end``, and is no part of the value.

    ``string`` or ``json`` precedes a value and gives its kind; both are empty if the format has no
    such tag. ``bare_key_end`` is the end of a key whose value's kind is not given.
    """

    key: str
    key_end: str
    value: str
    value_end: str
    end: str
    padded: bool = False
    string: str = ""
    json: str = ""
    bare_key_end: str = ""

    @property
    def key_ends(self) -> tuple[str, ...]:
        return (self.key_end, self.bare_key_end) if self.bare_key_end else (self.key_end,)

    @property
    def value_ends(self) -> tuple[str, ...]:
        """The ends of a value that is text, the longest first."""
        return (f"\n{self.value_end}", self.value_end) if self.padded else (self.value_end,)


class TaggedCall:
    """Reads calls written in ``markup``. ``others`` are the tags that may follow a call that breaks
    off.
    """

    def __init__(self, tools: Tools, markup: Markup, others: tuple[str, ...]) -> None:
        self._tools = tools
        self._markup = markup
        self._others = others

    def read(self, reader: Reader, speech: Speech, name: str) -> Steps[bool]:
        """Reads the call of the function ``name`` from after its name, which is pinned. False if no
        call has that name, or neither a member nor the end of the call follows.
        """
        name, markup = name.strip(), self._markup
        if not _NAME.fullmatch(name) and name not in self._tools:
            return False
        yield from reader.skip(SPACE)
        begin = opener(reader, speech, name)
        if (yield from reader.take(markup.end)):
            begin()
            speech.arguments("{}")
            speech.close_call()
            return True
        if not (yield from reader.take(markup.key)):
            return False
        begin()
        if (yield from self._members(reader, speech, Parameters(self._tools.get(name)))):
            speech.arguments("}")
            speech.close_call()
        yield from close(reader, speech, markup.end, self._others)
        return True

    def _members(self, reader: Reader, speech: Speech, schema: Parameters) -> Steps[bool]:
        """Reads the members, from after the first key's tag. False if one of them breaks off."""
        before, markup = "{", self._markup
        while True:
            pin = reader.pin()
            key = yield from reader.head(*markup.key_ends)
            told = reader.since(pin).endswith(markup.key_end)
            reader.release()
            if key is None:  # cut, or too long to be held
                speech.arguments(f'{before}"')
                end = yield from reader.scan(markup.key_ends, Quoted(speech.arguments))
                if end is None:
                    return False
                speech.arguments('": ')
                told, part = end == markup.key_end, True
            else:
                key = key.strip()
                speech.arguments(f"{before}{msgspec.json.encode(key).decode()}: ")
                part = schema.part(key)
            if markup.value and not (yield from optional(reader, markup.value)):
                return False
            if told and markup.string:
                part = yield from self._told(reader, part)
                if part is None:
                    return False
            if not (yield from self._value(reader, speech, schema, part)):
                return False
            if not (yield from optional(reader, markup.key)):
                return True
            before = ", "

    def _told(self, reader: Reader, part: Any) -> Steps[Any]:
        """The schema of the value that follows, by its tag; ``part`` if the tag is unknown, None if
        the text ends in it.
        """
        markup = self._markup
        for tag, schema in ((markup.string, _STRING), (markup.json, True)):
            if (yield from reader.take(tag)):
                return schema
        rest = yield from reader.ahead(max(len(markup.string), len(markup.json)))
        if markup.string.startswith(rest) or markup.json.startswith(rest):
            reader.step(len(rest))
            return None
        return part

    def _value(self, reader: Reader, speech: Speech, schema: Parameters, part: Any) -> Steps[bool]:
        markup = self._markup
        if markup.padded:
            yield from reader.take("\n")
        if schema.kinds(part) == TEXT:
            speech.arguments('"')
            found = yield from reader.scan(markup.value_ends, Quoted(speech.arguments))
            speech.arguments('"' if found else "")
            return found is not None
        pin = reader.pin()
        yield from reader.skip(SPACE)
        json, complete = yield from collected(reader)
        yield from reader.skip(SPACE)
        rest = yield from reader.ahead(len(markup.value_end))
        raw = reader.since(pin)
        raw = raw.removesuffix("\n") if markup.padded else raw
        if complete and rest == markup.value_end:
            reader.step(len(rest))
            reader.release()
            speech.arguments(json if schema.takes_json(part, json, raw) else encoded(raw))
            return True
        ended = rest != markup.value_end and markup.value_end.startswith(rest)
        begun = json and ended and markup.value_end not in raw
        if begun and schema.takes_json(part, json, raw):  # the text has ended
            reader.step(len(rest))
            reader.release()
            speech.arguments(json)
            return False
        reader.rewind(pin)
        parts: list[str] = []
        found = yield from reader.scan(markup.value_ends, parts.append)
        text = encoded("".join(parts))
        speech.arguments(text if found else text[:-1])
        return found is not None
