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
from .format import close, opener
from .invoked_calls import InvokedCalls, markers_of
from .lark import Lark
from .reader import SPACE, Reader, Steps
from .speech import Speech
from .tagged_call import Markup

SIGN = "｜DSML｜"
SECTION, SECTION_END = f"<{SIGN}function_calls>", f"</{SIGN}function_calls>"
CALL = f'<{SIGN}invoke name="'
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


class Dsml(InvokedCalls):
    section_start, section_end, call, markup = SECTION, SECTION_END, CALL, MARKUP
    openings: ClassVar[tuple[str, ...]] = (SECTION,)
    # The sign is a token of its own: it must reach the parser as well.
    markers: ClassVar[tuple[str, ...]] = (*markers_of(SECTION, SECTION_END, CALL, MARKUP), SIGN)

    def _arguments(self, reader: Reader, speech: Speech, name: str) -> Steps[bool]:
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
        """The model leaves a line free before the section."""
        return f"{lark.line_breaks(2)} {super().write(lark, names, many)}"
