"""MiniMax-M2: a section of calls, whose names and keys are attributes of their tags.

<minimax:tool_call>
<invoke name="get_weather">
<parameter name="city">Paris</parameter>
</invoke>
</minimax:tool_call>
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from .format import Tools, repeated, section
from .lark import Lark
from .members import TaggedMembers
from .reader import Reader, Steps
from .speech import Speech
from .tagged_call import Markup, TaggedCall

SECTION, SECTION_END = "<minimax:tool_call>", "</minimax:tool_call>"
CALL, NAME_END = '<invoke name="', '">'
MARKUP = Markup('<parameter name="', '">', "", "</parameter>", "</invoke>")


class MiniMax:
    openings: ClassVar[tuple[str, ...]] = (SECTION,)
    markers: ClassVar[tuple[str, ...]] = (
        SECTION,
        SECTION_END,
        CALL,
        MARKUP.end,
        MARKUP.key,
        MARKUP.value_end,
    )
    id_length: ClassVar[int] = 0

    def __init__(self, tools: Tools) -> None:
        self._tools = tools
        self._tagged = TaggedCall(tools, MARKUP, (CALL, SECTION_END))

    def read(self, reader: Reader, speech: Speech) -> Steps[bool]:
        return (yield from section(reader, speech, (CALL, self._call), SECTION_END))

    def _call(self, reader: Reader, speech: Speech) -> Steps[bool]:
        name = yield from reader.head(NAME_END)
        return name is not None and (yield from self._tagged.read(reader, speech, name))

    def write(self, lark: Lark, names: Iterable[str], many: bool) -> str:
        """Members come in the order of the schema."""
        line = lark.text("\n")
        calls = []
        for name in names:
            head = f"{lark.tag(CALL)} {lark.text(f'{name}{NAME_END}')} {line}"
            members = TaggedMembers(lark, self._tools[name], MARKUP, line).expression()
            calls.append(f"{head} {members} {lark.tag(MARKUP.end)}")
        calls_of_section = repeated(lark.either(calls), line, many)
        return f"{lark.tag(SECTION)} {line} {calls_of_section} {line} {lark.tag(SECTION_END)}"
