"""Grammars in the Lark dialect of llguidance, written piece by piece.

Each method returns an expression; pieces that need a rule of their own add one. The syntax is
described at https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec
from llguidance import regex_to_lark

from .json_schema import followed

Spell = Callable[[str], int | None]  # the id of a tag that is one token, None for any other

# Between the parts of JSON: nothing, a space, or a line break and an indent. The bound keeps a
# model from writing white space for ever.
WHITE_SPACE = r"( |\n[ \t]{0,32})"
_ANY = r"/(.|\n)*/"
_SIGNS = r"\.+*?()|[]{}^$#&-~/"  # they have a meaning in a regular expression


class Lark:
    """Collects the rules of a grammar."""

    def __init__(self, spell: Spell) -> None:
        self._spell = spell
        self._rules: list[str] = []

    def text(self, literal: str) -> str:
        """Exactly ``literal``."""
        return msgspec.json.encode(literal).decode()

    def tag(self, name: str) -> str:
        """A tag of the model's format: by the token that the tokenizer holds for it, else as text.

        A model writes its tags with their tokens. Spelled from smaller pieces they are foreign to
        it, so such a tag may be written in no other way.
        """
        id = self._spell(name)
        return self.text(name) if id is None else f"<[{id}]>"

    def line_breaks(self, most: int) -> str:
        """Up to ``most`` line breaks."""
        return self._rule(f"/\\n{{0,{most}}}/")

    def json(self, schema: Any) -> str:
        """A JSON value that follows ``schema``. Raises SchemaFault."""
        schema = {} if schema is True else followed(schema)
        if isinstance(schema, dict):
            schema = {**schema, "x-guidance": {"whitespace_pattern": WHITE_SPACE}}
        return self._rule(f"%json {msgspec.json.encode(schema).decode()}")

    def regex(self, pattern: str, without: Sequence[str] = (), first: str = "") -> str:
        """Text that ``pattern`` matches from start to end. It holds none of ``without`` and does
        not begin with ``first``, after white space or none.
        """
        if not pattern:
            return self._rule('""')
        banned = [f"(.|\\n)*{_pattern(text)}" for text in without]
        if first:
            banned.append(rf"[ \t\r\n]*{_pattern(first)}")
        return self._text_rule(f"/{regex_to_lark(pattern, '')}/", banned)

    def until(self, tag: str, without: Sequence[str] = ()) -> str:
        """Any text up to the first ``tag``, and the tag. The text holds none of ``without``."""
        banned = [f"(.|\\n)*{_pattern(text)}" for text in without]
        closing = f"(.|\\n)*{_pattern(tag)}"
        if self._spell(tag) is None:
            return self._text_rule(f"/{closing}/", banned, lazy=True)
        return f"{self._text_rule(_ANY, [closing, *banned])} {self.tag(tag)}"

    def matching(self, patterns: Sequence[str], tag: str, unlike: Sequence[str] = ()) -> str:
        """Text that all of ``patterns`` match and none of ``unlike``, and the first ``tag``."""
        if not patterns and not unlike:
            return self.until(tag)
        closing = f"(.|\\n)*{_pattern(tag)}(.|\\n)*"
        wanted = [f"/{regex_to_lark(pattern, '')}/" for pattern in patterns] or [_ANY]
        banned = [f"~/{regex_to_lark(pattern, '')}/" for pattern in unlike] + [f"~/{closing}/"]
        name = f"TEXT{len(self._rules)}"
        self._rules.append(f"{name}: {' & '.join([*wanted, *banned])}")
        if self._spell(tag) is not None:
            return f"{name} {self.tag(tag)}"
        whole = f"TEXT{len(self._rules)}"
        self._rules.append(f"{whole}: {name} {self.text(tag)}")
        return self._rule(whole, lazy=True)

    def named(self, expression: str) -> str:
        """The same by a name, for an expression that stands more than once."""
        return self._rule(expression)

    def either(self, expressions: Iterable[str]) -> str:
        return "(" + " | ".join(expressions) + ")"

    def finish(self, expression: str) -> str:
        """The whole grammar, which starts with ``expression``."""
        return "\n".join([f"start: {expression}", *self._rules])

    def _text_rule(self, pattern: str, banned: Sequence[str], lazy: bool = False) -> str:
        """A rule for the text that ``pattern`` matches and that does not begin as ``banned`` do."""
        if banned:
            # Only the name of a terminal, in capitals, may stand for an intersection.
            name = f"TEXT{len(self._rules)}"
            self._rules.append(f"{name}: {pattern} & ~/({'|'.join(banned)})(.|\\n)*/")
            pattern = name
        return self._rule(pattern, lazy)

    def _rule(self, body: str, lazy: bool = False) -> str:
        name = f"rule{len(self._rules)}"
        self._rules.append(f"{name}{'[lazy]' if lazy else ''}: {body}")
        return name


def _pattern(text: str) -> str:
    """A regular expression, as Lark has it, that matches ``text`` alone."""
    return regex_to_lark("".join(f"\\{char}" if char in _SIGNS else char for char in text), "")
