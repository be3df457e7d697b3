"""A section of calls whose names and keys are attributes of their tags, as MiniMax-M2 and
DeepSeek-V3.2 write them.
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

NAME_END = '">'


class InvokedCalls:
    """Calls between ``section_start`` and ``section_end``, each from ``call``, its name and
    ``NAME_END`` to the end of ``markup``.
    """

    section_start: ClassVar[str]
    section_end: ClassVar[str]
    call: ClassVar[str]
    markup: ClassVar[Markup]
    id_length: ClassVar[int] = 0

    def __init__(self, tools: Tools) -> None:
        self._tools = tools
        self._tagged = TaggedCall(tools, self.markup, (self.call, self.section_end))

    def read(self, reader: Reader, speech: Speech) -> Steps[bool]:
        return (yield from section(reader, speech, (self.call, self._call), self.section_end))

    def _call(self, reader: Reader, speech: Speech) -> Steps[bool]:
        name = yield from reader.head(NAME_END)
        return name is not None and (yield from self._arguments(reader, speech, name))

    def _arguments(self, reader: Reader, speech: Speech, name: str) -> Steps[bool]:
        return (yield from self._tagged.read(reader, speech, name))

    def write(self, lark: Lark, names: Iterable[str], many: bool) -> str:
        """Members come in the order of the schema."""
        line = lark.text("\n")
        calls = []
        for name in names:
            head = f"{lark.tag(self.call)} {lark.text(f'{name}{NAME_END}')} {line}"
            members = TaggedMembers(lark, self._tools[name], self.markup, line).expression()
            calls.append(f"{head} {members} {lark.tag(self.markup.end)}")
        calls_of_section = repeated(lark.either(calls), line, many)
        return f"{lark.tag(self.section_start)} {line} {calls_of_section} {line} {lark.tag(self.section_end)}"


def markers_of(section: str, section_end: str, call: str, markup: Markup) -> tuple[str, ...]:
    """The tags that must reach the parser."""
    return section, section_end, call, markup.end, markup.key, markup.value_end
