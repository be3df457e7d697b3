"""Mistral and Mixtral: a tag before a JSON array of calls or, from tokenizer version 11 on, before
each name.

    [TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}}]
    [TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}

``[CALL_ID]`` and an id may come before ``[ARGS]``. The chat templates accept only ids of nine
letters and digits.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import msgspec

from .call_object import call_arguments, call_object
from .format import Tools, arguments, opener, repeated
from .lark import Lark
from .reader import SPACE, Reader, Steps
from .speech import Speech

OPEN, ARGUMENTS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"


class Mistral:
    openings: ClassVar[tuple[str, ...]] = (OPEN,)
    markers: ClassVar[tuple[str, ...]] = (OPEN, ARGUMENTS, CALL_ID)
    id_length: ClassVar[int] = 9

    def __init__(self, tools: Tools) -> None:
        self._tools = tools

    def read(self, reader: Reader, speech: Speech) -> Steps[bool]:
        yield from reader.skip(SPACE)
        if (yield from reader.take("[")):
            return (yield from self._array(reader, speech))
        head = yield from reader.head(ARGUMENTS, "{")
        if head is None:
            return False
        reader.back(1)  # a brace belongs to the arguments
        if (yield from reader.peek()) != "{":
            reader.step(1)
        name, _, id = head.strip().partition(CALL_ID)
        if not name or any(char in name for char in " \n[]{}"):
            return False
        known = id if len(id) == self.id_length and id.isascii() and id.isalnum() else None
        if not (yield from call_arguments(reader, speech, opener(reader, speech, name, known), OPEN)):
            return False
        yield from self._close(reader, speech)
        return True

    def _array(self, reader: Reader, speech: Speech) -> Steps[bool]:
        num_calls = 0
        while not speech.full:
            pin = reader.pin()
            yield from reader.skip(SPACE)
            if not (yield from call_object(reader, speech)):
                if num_calls == 0:
                    return False
                reader.rewind(pin)
                break
            num_calls += 1
            if not (yield from self._next(reader)):
                break
        yield from self._close(reader, speech)
        return True

    @staticmethod
    def _next(reader: Reader) -> Steps[bool]:
        """Moves past a comma, and past unmatched braces before it."""
        pin = reader.pin()
        yield from reader.skip(SPACE + "}")
        if (yield from reader.take(",")):
            reader.release()
            return True
        reader.rewind(pin)
        return False

    @staticmethod
    def _close(reader: Reader, speech: Speech) -> Steps[None]:
        """Moves past the bracket that ends an array of calls, and past unmatched ones."""
        pin = reader.pin()
        yield from reader.skip(SPACE + "}]")
        rest = yield from reader.ahead(len(OPEN))
        if OPEN.startswith(rest):
            reader.release()
            return
        reader.rewind(pin)
        pin = reader.pin()
        yield from reader.skip(SPACE + "}")
        if (yield from reader.take("]")):
            reader.release()
        else:
            reader.rewind(pin)

    def write(self, lark: Lark, names: Iterable[str], many: bool) -> str:
        opening = lark.tag(OPEN)
        heads = []
        bodies = []
        for name in names:
            schema = lark.json(arguments(self._tools, name))
            head = f'{{"name": {msgspec.json.encode(name).decode()}, "arguments": '
            bodies.append(f"{lark.text(head)} {schema} {lark.text('}')}")
            heads.append(f"{opening} {lark.text(name)} {lark.tag(ARGUMENTS)}? {schema}")
        body = repeated(lark.either(bodies), lark.text(", "), many)
        array = f"{opening} {lark.text(' ')}? {lark.text('[')} {body} {lark.text(']')}"
        return lark.either([array, repeated(lark.either(heads), "", many)])
