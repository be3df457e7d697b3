"""Hermes and Qwen: a JSON object between two tags. The chat templates of Hermes 2 Pro, Qwen2.5 and
Qwen3 write:

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Paris"}}
    </tool_call>
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import msgspec

from .call_object import call_object
from .format import Tools, arguments, close, repeated
from .lark import Lark
from .reader import SPACE, Reader, Steps
from .speech import Speech

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class Hermes:
    openings: ClassVar[tuple[str, ...]] = (OPEN,)
    markers: ClassVar[tuple[str, ...]] = (OPEN, CLOSE)
    id_length: ClassVar[int] = 0

    def __init__(self, tools: Tools) -> None:
        self._tools = tools

    def read(self, reader: Reader, speech: Speech) -> Steps[bool]:
        yield from reader.skip(SPACE)
        if (yield from reader.take("[")):  # some models write a list of calls
            yield from reader.skip(SPACE)
        if not (yield from call_object(reader, speech)):
            return False
        while speech.calls[-1].complete and not speech.full:
            pin = reader.pin()
            yield from reader.skip(SPACE + ",")
            if not (yield from call_object(reader, speech)):
                reader.rewind(pin)
                break
        yield from close(reader, speech, CLOSE, (OPEN,))
        return True

    def write(self, lark: Lark, names: Iterable[str], many: bool) -> str:
        line = lark.line_breaks(1)
        calls = [
            f"{lark.tag(OPEN)} {line} {lark.text(_head(name))} {lark.json(arguments(self._tools, name))} "
            f"{lark.text('}')} {line} {lark.tag(CLOSE)}"
            for name in names
        ]
        return repeated(lark.either(calls), line, many)


def _head(name: str) -> str:
    return f'{{"name": {msgspec.json.encode(name).decode()}, "arguments": '
