"""DeepSeek-V3.2: a section of calls in DSML, whose parameters say whether they are strings. The
checkpoint's encoding/encoding_dsv32.py writes:

    <｜DSML｜function_calls>
    <｜DSML｜invoke name="get_weather">
    <｜DSML｜parameter name="city" string="true">Paris</｜DSML｜parameter>
    <｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>
    </｜DSML｜invoke>
    </｜DSML｜function_calls>

Models also write the arguments of a call as one JSON object in place of its parameters, say those
who serve them (https://github.com/smg-project/smg/pull/895).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from .call_object import call_arguments
from .format import Tools, close, opener, repeated, section
from .lark import Lark
from .members import TaggedMembers
from .reader import SPACE, Reader, Steps
from .speech import Speech
from .tagged_call import Markup, TaggedCall

SIGN = "｜DSML｜"
SECTION, SECTION_END = f"<{SIGN}function_calls>", f"</{SIGN}function_calls>"
CALL, NAME_END = f'<{SIGN}invoke name="', '">'
MARKUP = Markup(
    key=f'<{SIGN}parameter name="',
    key_end='" string="',
    value="",
    value_end=f"</{SIGN}parameter>",
    end=f"</{SIGN}invoke>",
    string='true">',
    json='false">',
    bare_key_end='">',
)


class Dsml:
    openings: ClassVar[tuple[str, ...]] = (SECTION,)
    # The sign is a token of its own: it must reach the parser as well.
    markers: ClassVar[tuple[str, ...]] = (
        SECTION,
        SECTION_END,
        CALL,
        MARKUP.end,
        MARKUP.key,
        MARKUP.value_end,
        SIGN,
    )
    id_length: ClassVar[int] = 0

    def __init__(self, tools: Tools) -> None:
        self._tools = tools
        self._tagged = TaggedCall(tools, MARKUP, (CALL, SECTION_END))

    def read(self, reader: Reader, speech: Speech) -> Steps[bool]:
        return (yield from section(reader, speech, (CALL, self._call), SECTION_END))

    def _call(self, reader: Reader, speech: Speech) -> Steps[bool]:
        name = yield from reader.head(NAME_END)
        if name is None:
            return False
        yield from reader.skip(SPACE)
        if (yield from reader.peek()) != "{":
            return (yield from self._tagged.read(reader, speech, name))
        name = name.strip()
        if not name or SIGN in name:
            return False
        yield from call_arguments(reader, speech, opener(reader, speech, name), MARKUP.end)
        yield from close(reader, speech, MARKUP.end, (CALL, SECTION_END))
        return True

    def write(self, lark: Lark, names: Iterable[str], many: bool) -> str:
        """Members come in the order of the schema."""
        line = lark.text("\n")
        calls = []
        for name in names:
            head = f"{lark.tag(CALL)} {lark.text(f'{name}{NAME_END}')} {line}"
            members = TaggedMembers(lark, self._tools[name], MARKUP, line).expression()
            calls.append(f"{head} {members} {lark.tag(MARKUP.end)}")
        calls_of_section = repeated(lark.either(calls), line, many)
        # The model leaves a line free before the section.
        opening = f"{lark.line_breaks(2)} {lark.tag(SECTION)}"
        return f"{opening} {line} {calls_of_section} {line} {lark.tag(SECTION_END)}"
