"""Kimi-K2: a section of calls, each with arguments and an id made of the name and a running number.

    <|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0
    <|tool_call_argument_begin|>{"city": "Paris"}<|tool_call_end|><|tool_calls_section_end|>

(without the line break). The client gets the id as it is, because the chat template writes it back.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from .call_object import call_arguments
from .format import Tools, arguments, close, opener, repeated, section
from .lark import Lark
from .reader import Reader, Steps
from .speech import Speech

SECTION, SECTION_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CALL, ARGUMENTS, CALL_END = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"


class Kimi:
    openings: ClassVar[tuple[str, ...]] = (SECTION,)
    markers: ClassVar[tuple[str, ...]] = (SECTION, SECTION_END, CALL, ARGUMENTS, CALL_END)
    id_length: ClassVar[int] = 0

    def __init__(self, tools: Tools) -> None:
        self._tools = tools

    def read(self, reader: Reader, speech: Speech) -> Steps[bool]:
        return (yield from section(reader, speech, (CALL, self._call), SECTION_END))

    def _call(self, reader: Reader, speech: Speech) -> Steps[bool]:
        head = yield from reader.head(ARGUMENTS)
        id = (head or "").strip()
        name = id.removeprefix("functions.").rpartition(":")[0] or id
        if not name:
            return False
        begin = opener(reader, speech, name, id)
        if not (yield from call_arguments(reader, speech, begin, CALL_END)):
            return False
        yield from close(reader, speech, CALL_END, (CALL, SECTION_END))
        return True

    def write(self, lark: Lark, names: Iterable[str], many: bool) -> str:
        line = lark.line_breaks(1)
        number = lark.regex("[0-9]{1,4}")
        calls = []
        for name in names:
            head = f"{lark.text(f'functions.{name}:')} {number} {lark.tag(ARGUMENTS)}"
            calls.append(f"{head} {lark.json(arguments(self._tools, name))}")
        call = f"{lark.tag(CALL)} {lark.either(calls)} {lark.tag(CALL_END)}"
        return f"{lark.tag(SECTION)} {repeated(call, line, many)} {lark.tag(SECTION_END)}"
