"""Grammars in the Lark dialect of llguidance, written piece by piece.

Each method returns an expression; pieces that need a rule of their own add one. The syntax is
described at https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import msgspec
from llguidance import regex_to_lark

Spell = Callable[[str], int | None]  # the id of a tag that is a special token, None for any other

# Between the parts of JSON: nothing, a space, or a line break and an indent. The bound keeps a
# model from writing white space for ever.
WHITE_SPACE = r"( |\n[ \t]{0,32})"


class Lark:
    """Collects the rules of a grammar."""

    def __init__(self, spell: Spell) -> None:
        self._spell = spell
        self._rules: list[str] = []

    def text(self, literal: str) -> str:
        """Exactly ``literal``."""
        return msgspec.json.encode(literal).decode()

    def tag(self, name: str) -> str:
        """A tag of the model's format: its token if it is a special one, else its text."""
        id = self._spell(name)
        return self.text(name) if id is None else f"<[{id}]>"

    def line_breaks(self, most: int) -> str:
        """Up to ``most`` line breaks."""
        return self._rule(f"/\\n{{0,{most}}}/")

    def json(self, schema: Any) -> str:
        """A JSON value that follows ``schema``."""
        if schema is True:
            schema = {}
        if isinstance(schema, dict):
            schema = {**schema, "x-guidance": {"whitespace_pattern": WHITE_SPACE}}
        return self._rule(f"%json {msgspec.json.encode(schema).decode()}")

    def regex(self, pattern: str) -> str:
        """Text that ``pattern`` matches from start to end."""
        return self._rule(f"/{regex_to_lark(pattern, '')}/" if pattern else '""')

    def until(self, tag: str) -> str:
        """Any text up to ``tag`` and the tag."""
        id = self._spell(tag)
        if id is not None:
            return self._rule(f"/(.|\\n)*/ <[{id}]>")
        return self._rule(f"/(.|\\n)*{regex_to_lark(_escaped(tag), '')}/", lazy=True)

    def either(self, expressions: Iterable[str]) -> str:
        return "(" + " | ".join(expressions) + ")"

    def finish(self, expression: str) -> str:
        """The whole grammar, which starts with ``expression``."""
        return "\n".join([f"start: {expression}", *self._rules])

    def _rule(self, body: str, lazy: bool = False) -> str:
        name = f"rule{len(self._rules)}"
        self._rules.append(f"{name}{'[lazy]' if lazy else ''}: {body}")
        return name


def _escaped(text: str) -> str:
    return "".join(f"\\{char}" if char in r"\.+*?()|[]{}^$#&-~/" else char for char in text)
