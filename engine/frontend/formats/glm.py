"""GLM: a name, then keys and values between tags. The chat templates of GLM-4.5 and GLM-4.7 write:

<tool_call>get_weather
<arg_key>city</arg_key>
<arg_value>Paris</arg_value>
</tool_call>

<tool_call>get_weather<arg_key>city</arg_key><arg_value>Paris</arg_value></tool_call>
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from .format import Tools, repeated
from .lark import Lark
from .members import TaggedMembers
from .reader import Reader, Steps
from .speech import Speech
from .tagged_call import Markup, TaggedCall

OPEN, CLOSE = "<tool_call>", "</tool_call>"
MARKUP = Markup("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", CLOSE)


class Glm:
    openings: ClassVar[tuple[str, ...]] = (OPEN,)
    markers: ClassVar[tuple[str, ...]] = (
        OPEN,
        CLOSE,
        MARKUP.key,
        MARKUP.key_end,
        MARKUP.value,
        MARKUP.value_end,
    )
    id_length: ClassVar[int] = 0
    _line_breaks: ClassVar[int] = 1  # at most so many between the tags of a forced call

    def __init__(self, tools: Tools) -> None:
        self._tools = tools
        self._call = TaggedCall(tools, MARKUP, (OPEN,))

    def read(self, reader: Reader, speech: Speech) -> Steps[bool]:
        head = yield from reader.head("<")
        if head is None:
            return False
        reader.back(1)  # the bracket
        return (yield from self._call.read(reader, speech, head))

    def write(self, lark: Lark, names: Iterable[str], many: bool) -> str:
        """Members come in the order of the schema."""
        line = lark.line_breaks(self._line_breaks)
        calls = []
        for name in names:
            members = TaggedMembers(lark, self._tools[name], MARKUP, line).expression()
            calls.append(" ".join([lark.tag(OPEN), lark.text(name), line, members, lark.tag(CLOSE)]))
        return repeated(lark.either(calls), line, many)


class Glm47(Glm):
    _line_breaks: ClassVar[int] = 0
