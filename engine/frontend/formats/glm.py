"""GLM-4.5 and its successors: a name, then keys and values between tags. Strings are written as
they are, other values as JSON.

    <tool_call>get_weather
    <arg_key>city</arg_key>
    <arg_value>Paris</arg_value>
    </tool_call>

The schema of the function tells which values are strings: where it allows a string, a value is
one, unless it is a null, an array or an object that the schema allows too. Without a schema, a
value that is valid JSON is taken as JSON.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, ClassVar

import msgspec

from .format import Tools, close, opener, optional, repeated
from .glm_members import KEY, KEY_END, VALUE, VALUE_END, GlmMembers
from .json_text import Quoted, collected, encoded
from .lark import Lark
from .parameters import TEXT, Parameters
from .reader import SPACE, Reader, Steps
from .speech import Speech

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_NAME = re.compile(r"[\w.:/-]+")


class Glm:
    openings: ClassVar[tuple[str, ...]] = (OPEN,)
    markers: ClassVar[tuple[str, ...]] = (OPEN, CLOSE, KEY, KEY_END, VALUE, VALUE_END)
    id_length: ClassVar[int] = 0

    def __init__(self, tools: Tools) -> None:
        self._tools = tools

    def read(self, reader: Reader, speech: Speech) -> Steps[bool]:
        head = yield from reader.head("<")
        name = (head or "").strip()
        if not _NAME.fullmatch(name) and name not in self._tools:
            return False
        reader.back(1)  # the bracket
        begin = opener(reader, speech, name)
        if (yield from reader.take(CLOSE)):
            begin()
            speech.arguments("{}")
            speech.close_call()
            return True
        if not (yield from reader.take(KEY)):
            return False
        begin()
        if (yield from self._members(reader, speech, Parameters(self._tools.get(name)))):
            speech.arguments("}")
            speech.close_call()
        yield from close(reader, speech, CLOSE, (OPEN,))
        return True

    def _members(self, reader: Reader, speech: Speech, schema: Parameters) -> Steps[bool]:
        """Reads the members, from after the first key's tag. False if one of them breaks off."""
        before = "{"
        while True:
            key = yield from reader.head(KEY_END)
            if key is None:  # cut, or too long to be held
                speech.arguments(f'{before}"')
                if (yield from reader.scan((KEY_END,), Quoted(speech.arguments))) is None:
                    return False
                speech.arguments('": ')
                part: Any = True
            else:
                key = key.strip()
                speech.arguments(f"{before}{msgspec.json.encode(key).decode()}: ")
                part = schema.part(key)
            if not (yield from optional(reader, VALUE)):
                return False
            if not (yield from self._value(reader, speech, schema, part)):
                return False
            if not (yield from optional(reader, KEY)):
                return True
            before = ", "

    def _value(self, reader: Reader, speech: Speech, schema: Parameters, part: Any) -> Steps[bool]:
        if schema.kinds(part) == TEXT:
            speech.arguments('"')
            found = yield from reader.scan((VALUE_END,), Quoted(speech.arguments))
            speech.arguments('"' if found else "")
            return found is not None
        pin = reader.pin()
        yield from reader.skip(SPACE)
        json, complete = yield from collected(reader)
        yield from reader.skip(SPACE)
        rest = yield from reader.ahead(len(VALUE_END))
        if complete and rest == VALUE_END:
            raw = reader.since(pin)
            reader.step(len(VALUE_END))
            reader.release()
            speech.arguments(json if schema.takes_json(part, json, raw) else encoded(raw))
            return True
        if VALUE_END.startswith(rest) and json and schema.takes_json(part, json, reader.since(pin)):
            reader.step(len(rest))  # the text has ended
            reader.release()
            speech.arguments(json)
            return False
        reader.rewind(pin)
        parts: list[str] = []
        found = yield from reader.scan((VALUE_END,), parts.append)
        text = encoded("".join(parts))
        speech.arguments(text if found else text[:-1])
        return found is not None

    def write(self, lark: Lark, names: Iterable[str], many: bool) -> str:
        """Members come in the order of the schema."""
        line = lark.line_breaks(1)
        calls = []
        for name in names:
            members = GlmMembers(lark, self._tools[name], line).expression()
            calls.append(" ".join([lark.tag(OPEN), lark.text(name), line, members, lark.tag(CLOSE)]))
        return repeated(lark.either(calls), line, many)
