"""MiniMax-M2: a section of calls, whose names and keys are attributes of their tags.

<minimax:tool_call>
<invoke name="get_weather">
<parameter name="city">Paris</parameter>
</invoke>
</minimax:tool_call>
"""

from __future__ import annotations

from typing import ClassVar

from .invoked_calls import InvokedCalls, markers_of
from .tagged_call import Markup

SECTION, SECTION_END = "<minimax:tool_call>", "</minimax:tool_call>"
CALL = '<invoke name="'
MARKUP = Markup('<parameter name="', '">', "", "</parameter>", "</invoke>")


class MiniMax(InvokedCalls):
    section_start, section_end, call, markup = SECTION, SECTION_END, CALL, MARKUP
    openings: ClassVar[tuple[str, ...]] = (SECTION,)
    markers: ClassVar[tuple[str, ...]] = markers_of(SECTION, SECTION_END, CALL, MARKUP)
