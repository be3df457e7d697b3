"""Qwen3-Coder, Qwen3.5 and Nemotron-3: the name of the function and of each argument is part of its
tag, the value is between line breaks.

    <tool_call>
    <function=get_weather>
    <parameter=city>
    Paris
    </parameter>
    </function>
    </tool_call>

Models now and then leave the outer tags out.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from .format import Tools, optional, repeated
from .lark import Lark
from .members import TaggedMembers
from .reader import SPACE, Reader, Steps
from .speech import Speech
from .tagged_call import Markup, TaggedCall

OPEN, CLOSE = "<tool_call>", "</tool_call>"
FUNCTION, NAME_END = "<function=", ">"
MARKUP = Markup("<parameter=", ">", "", "</parameter>", "</function>", padded=True)


class QwenCoder:
    openings: ClassVar[tuple[str, ...]] = (OPEN, FUNCTION)
    markers: ClassVar[tuple[str, ...]] = (OPEN, CLOSE, FUNCTION, MARKUP.end, MARKUP.key, MARKUP.value_end)
    id_length: ClassVar[int] = 0

    def __init__(self, tools: Tools) -> None:
        self._tools = tools
        self._call = TaggedCall(tools, MARKUP, (OPEN, FUNCTION, CLOSE))

    def read(self, reader: Reader, speech: Speech) -> Steps[bool]:
        yield from reader.skip(SPACE)
        yield from reader.take(FUNCTION)
        name = yield from reader.head(NAME_END)
        if name is None or not (yield from self._call.read(reader, speech, name)):
            return False
        yield from optional(reader, CLOSE)
        return True

    def write(self, lark: Lark, names: Iterable[str], many: bool) -> str:
        """Members come in the order of the schema."""
        line = lark.text("\n")
        calls = []
        for name in names:
            head = f"{line} {lark.tag(FUNCTION)} {lark.text(f'{name}{NAME_END}')} {line}"
            members = TaggedMembers(lark, self._tools[name], MARKUP, line).expression()
            calls.append(f"{head} {members} {lark.tag(MARKUP.end)} {line}")
        call = f"{lark.tag(OPEN)} {lark.either(calls)} {lark.tag(CLOSE)}"
        return repeated(call, lark.line_breaks(1), many)
