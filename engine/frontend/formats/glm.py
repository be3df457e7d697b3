"""GLM-4.5 and its successors: a name, then keys and values between tags. Strings are written as
they are, other values as JSON.

    <tool_call>get_weather
    <arg_key>city</arg_key>
    <arg_value>Paris</arg_value>
    </tool_call>

The schema of the function tells which values are strings. Without a schema, a value that is valid
JSON is taken as JSON.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, ClassVar

import msgspec

from .format import Tools, close, optional, repeated
from .json_text import Quoted, decoded
from .lark import Lark
from .reader import Reader, Steps
from .speech import Speech

OPEN, CLOSE = "<tool_call>", "</tool_call>"
KEY, KEY_END, VALUE, VALUE_END = "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"
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
        if not _NAME.fullmatch(name):
            return False
        reader.back(1)  # the bracket
        if (yield from reader.take(CLOSE)):
            self._open(reader, speech, name)
            speech.arguments("{}")
            speech.close_call()
            return True
        if not (yield from reader.take(KEY)):
            return False
        self._open(reader, speech, name)
        if (yield from self._members(reader, speech, self._tools.get(name, {}))):
            speech.arguments("}")
            speech.close_call()
        yield from close(reader, speech, CLOSE)
        return True

    @staticmethod
    def _open(reader: Reader, speech: Speech, name: str) -> None:
        speech.open_call(name)
        reader.release()

    def _members(self, reader: Reader, speech: Speech, schema: dict[str, Any]) -> Steps[bool]:
        """Reads the members, from after the first key's tag. False if the text ends within one."""
        before = "{"
        while True:
            key = yield from reader.head(KEY_END)
            if key is None or not (yield from optional(reader, VALUE)):
                return False
            key = key.strip()
            speech.arguments(f"{before}{msgspec.json.encode(key).decode()}: ")
            if not (yield from self._value(reader, speech, schema.get("properties", {}).get(key, {}))):
                return False
            if not (yield from optional(reader, KEY)):
                return True
            before = ", "

    def _value(self, reader: Reader, speech: Speech, schema: Any) -> Steps[bool]:
        if isinstance(schema, dict) and schema.get("type") == "string":
            speech.arguments('"')
            found = yield from reader.scan((VALUE_END,), Quoted(speech.arguments))
            speech.arguments('"' if found else "")
            return found is not None
        parts: list[str] = []
        found = yield from reader.scan((VALUE_END,), parts.append)
        text = "".join(parts)
        speech.arguments(text.strip() if _is_json(text) else msgspec.json.encode(text).decode())
        return found is not None

    def write(self, lark: Lark, names: Iterable[str], many: bool) -> str:
        """Members come in the order of the schema. A string is any text."""
        line = lark.line_breaks(1)
        calls = []
        for name in names:
            schema = self._tools[name]
            members = [
                self._member(lark, line, schema, key, part)
                + ("" if key in schema.get("required", ()) else "?")
                for key, part in schema.get("properties", {}).items()
            ]
            calls.append(" ".join([lark.tag(OPEN), lark.text(name), line, *members, lark.tag(CLOSE)]))
        return repeated(lark.either(calls), line, many)

    @staticmethod
    def _member(lark: Lark, line: str, schema: dict[str, Any], key: str, part: Any) -> str:
        if isinstance(part, dict) and part.get("type") == "string" and "enum" in part:
            value = f"{lark.either(lark.text(str(choice)) for choice in part['enum'])} {lark.tag(VALUE_END)}"
        elif isinstance(part, dict) and part.get("type") == "string":
            value = lark.until(VALUE_END)
        else:
            named = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
            value = (
                f"{lark.json({**part, **named} if isinstance(part, dict) else part)} {lark.tag(VALUE_END)}"
            )
        return (
            f"({lark.tag(KEY)} {lark.text(key)} {lark.tag(KEY_END)} {line} {lark.tag(VALUE)} {value} {line})"
        )


def _is_json(text: str) -> bool:
    try:
        decoded(text.strip())
    except (ValueError, RecursionError):
        return False
    return True
