"""DeepSeek-V3 and R1: a section of calls, each with a type, a name and a fenced block. V3.1 leaves
type and fence out. The chat templates of the two write:

    <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather
    ```json
    {"city": "Paris"}
    ```<｜tool▁call▁end｜><｜tool▁calls▁end｜>

    <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>
    {"city": "Paris"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>

(the second without its line break).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from .call_object import call_arguments
from .format import Tools, arguments, close, opener, repeated, section
from .lark import Lark
from .reader import SPACE, Reader, Steps
from .speech import Speech

SECTION, SECTION_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, SEPARATOR, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
FENCE, FENCE_END = "```json", "```"
TYPE = "function"


class DeepSeek:
    openings: ClassVar[tuple[str, ...]] = (SECTION,)
    markers: ClassVar[tuple[str, ...]] = (SECTION, SECTION_END, CALL, SEPARATOR, CALL_END)
    id_length: ClassVar[int] = 0
    _bare_only: ClassVar[bool] = False  # forced calls have neither type nor fence

    def __init__(self, tools: Tools) -> None:
        self._tools = tools

    def read(self, reader: Reader, speech: Speech) -> Steps[bool]:
        return (yield from section(reader, speech, (CALL, self._call), SECTION_END))

    def _call(self, reader: Reader, speech: Speech) -> Steps[bool]:
        head = yield from reader.head(SEPARATOR)
        if head is None:
            return False
        yield from reader.skip(SPACE)
        if head.strip() == TYPE and not (yield from reader.peek()):
            return False
        fenced = not (yield from self._bare(reader))
        if fenced:  # the name follows the separator
            if head.strip() != TYPE:
                return False
            head = yield from reader.head("\n")
            yield from reader.skip(SPACE)
            if not (yield from reader.take(FENCE)):
                return False
        name = (head or "").strip()
        if not name or any(marker in name for marker in self.markers):
            return False
        end = FENCE_END if fenced else CALL_END
        if not (yield from call_arguments(reader, speech, opener(reader, speech, name), end)):
            return False
        if fenced:
            yield from close(reader, speech, FENCE_END, (CALL, CALL_END, SECTION_END))
        yield from close(reader, speech, CALL_END, (CALL, SECTION_END))
        return True

    @staticmethod
    def _bare(reader: Reader) -> Steps[bool]:
        """Whether arguments follow the separator, or null, or none before the end of the call."""
        if (yield from reader.peek()) in ("", "{", '"'):
            return True
        text = yield from reader.ahead(len("null") + len(CALL_END))
        return CALL_END.startswith(text.removeprefix("null")[: len(CALL_END)])

    def write(self, lark: Lark, names: Iterable[str], many: bool) -> str:
        line = lark.line_breaks(1)
        separator = lark.tag(SEPARATOR)
        calls = []
        for name in names:
            schema = lark.json(arguments(self._tools, name))
            before = lark.text(f"{name}\n{FENCE}\n")
            after = lark.text(f"\n{FENCE_END}")
            calls.append(f"{lark.text(name)} {separator} {schema}")
            if not self._bare_only:
                calls.append(f"{lark.text(TYPE)} {separator} {before} {schema} {after}")
        call = f"{lark.tag(CALL)} {lark.either(calls)} {lark.tag(CALL_END)}"
        return f"{lark.tag(SECTION)} {repeated(call, line, many)} {lark.tag(SECTION_END)}"


class DeepSeekV31(DeepSeek):
    _bare_only: ClassVar[bool] = True
