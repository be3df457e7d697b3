"""Hy3: a section of calls, each a name, then keys and values between tags. The tags of the released
checkpoints end in a suffix, those of the preview have none.

<tool_calls:opensource>
<tool_call:opensource>get_weather<tool_sep:opensource>
<arg_key:opensource>city</arg_key:opensource>
<arg_value:opensource>Paris</arg_value:opensource>
</tool_call:opensource>
</tool_calls:opensource>
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from .format import Tools, repeated, section
from .lark import Lark
from .members import TaggedMembers
from .reader import Reader, Steps
from .speech import Speech
from .tagged_call import Markup, TaggedCall

SUFFIX = ":opensource"
_SUFFIX_OF_TEMPLATE = re.compile(r"\bHYTK\s*=\s*(['\"])(.*?)\1")


@dataclass(frozen=True, slots=True)
class _Tags:
    """The tags with one suffix."""

    section: str
    section_end: str
    call: str
    name_end: str
    markup: Markup

    @classmethod
    def ending_in(cls, suffix: str) -> _Tags:
        def tag(name: str) -> str:
            return f"<{name}{suffix}>"

        value_end = tag("/arg_value")
        call_end = tag("/tool_call")
        markup = Markup(tag("arg_key"), tag("/arg_key"), tag("arg_value"), value_end, call_end)
        return cls(tag("tool_calls"), tag("/tool_calls"), tag("tool_call"), tag("tool_sep"), markup)

    @property
    def all(self) -> tuple[str, ...]:
        markup = self.markup
        arguments = (markup.key, markup.key_end, markup.value, markup.value_end)
        return self.section, self.section_end, self.call, markup.end, self.name_end, *arguments


class Hy3:
    _tags: ClassVar[_Tags] = _Tags.ending_in(SUFFIX)
    openings: ClassVar[tuple[str, ...]] = (_tags.section,)
    markers: ClassVar[tuple[str, ...]] = _tags.all
    id_length: ClassVar[int] = 0

    def __init__(self, tools: Tools) -> None:
        self._tools = tools
        self._tagged = TaggedCall(tools, self._tags.markup, (self._tags.call, self._tags.section_end))

    def read(self, reader: Reader, speech: Speech) -> Steps[bool]:
        return (yield from section(reader, speech, (self._tags.call, self._call), self._tags.section_end))

    def _call(self, reader: Reader, speech: Speech) -> Steps[bool]:
        name = yield from reader.head(self._tags.name_end)
        return name is not None and (yield from self._tagged.read(reader, speech, name))

    def write(self, lark: Lark, names: Iterable[str], many: bool) -> str:
        """Members come in the order of the schema."""
        tags, line = self._tags, lark.text("\n")
        calls = []
        for name in names:
            head = f"{lark.tag(tags.call)} {lark.text(name)} {lark.tag(tags.name_end)} {line}"
            members = TaggedMembers(lark, self._tools[name], tags.markup, line).expression()
            calls.append(f"{head} {members} {lark.tag(tags.markup.end)}")
        calls_of_section = repeated(lark.either(calls), line, many)
        return f"{lark.tag(tags.section)} {line} {calls_of_section} {line} {lark.tag(tags.section_end)}"


class Hy3Preview(Hy3):
    _tags: ClassVar[_Tags] = _Tags.ending_in("")
    openings: ClassVar[tuple[str, ...]] = (_tags.section,)
    markers: ClassVar[tuple[str, ...]] = _tags.all


def spelled(template: str) -> str:
    """A chat template with its tags in full: Hy3's makes them of ``<think{}>`` and a suffix."""
    found = _SUFFIX_OF_TEMPLATE.search(template)
    return template if found is None else template.replace("{}", found[2])


def has_suffix(template: str) -> bool:
    """Whether a chat template makes its tags of a suffix."""
    return _SUFFIX_OF_TEMPLATE.search(template) is not None
