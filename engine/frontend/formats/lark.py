"""Grammars in the Lark dialect of llguidance, written piece by piece.

Each method returns an expression; pieces that need a rule of their own add one. The syntax is
described at https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

from __future__ import annotations

import re
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
_PART = re.compile("｜[^｜]+｜")  # part of a tag that may be a token
_SIGNS = r"\.+*?()|[]{}^$#&-~/"  # special characters of regular expressions


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
        it, so such a tag may be written in no other way. The same holds for a part of it between
        signs, as in DeepSeek's ``<｜DSML｜invoke``.
        """
        before, token, after = self._spelled(name)
        texts = [self.text(text) if text else "" for text in (before, after)]
        return " ".join(filter(None, (texts[0], token, texts[1])))

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
        before, token, after = self._spelled(tag)
        if not token:
            return self._text_rule(f"/(.|\\n)*{_pattern(tag)}/", banned, lazy=True)
        closing = f"(.|\\n)*{_pattern(tag)}"
        if not before:
            return f"{self._text_rule(_ANY, [closing, *banned])} {self.tag(tag)}"
        body = self._terminal(f"{_ANY} & ~/({'|'.join([closing, *banned])})(.|\\n)*/")
        return " ".join([self._terminal(f"{body} {self.text(before)}"), token, self.text(after)])

    def matching(self, patterns: Sequence[str], tag: str, unlike: Sequence[str] = ()) -> str:
        """Text that all of ``patterns`` match and none of ``unlike``, and the first ``tag``."""
        if not patterns and not unlike:
            return self.until(tag)
        wanted = [f"/{regex_to_lark(pattern, '')}/" for pattern in patterns] or [_ANY]
        banned = [f"~/{regex_to_lark(pattern, '')}/" for pattern in unlike]
        before, token, after = self._spelled(tag)
        banned.append(f"~/(.|\\n)*{_pattern(tag)}(.|\\n)*/")
        body = self._terminal(" & ".join([*wanted, *banned]))
        if not token:
            return self._rule(self._terminal(f"{body} {self.text(tag)}"), lazy=True)
        if not before:
            return f"{body} {self.tag(tag)}"
        return " ".join([self._terminal(f"{body} {self.text(before)}"), token, self.text(after)])

    def named(self, expression: str) -> str:
        """A named rule, for an expression that is used more than once."""
        return self._rule(expression)

    def either(self, expressions: Iterable[str]) -> str:
        return "(" + " | ".join(expressions) + ")"

    def finish(self, expression: str) -> str:
        """The whole grammar, which starts with ``expression``."""
        return "\n".join([f"start: {expression}", *self._rules])

    def _spelled(self, tag: str) -> tuple[str, str, str]:
        """The text of ``tag`` before its token, the token's expression, and the text behind it.
        A tag without a token is all text, with an empty expression.
        """
        id = self._spell(tag)
        if id is not None:
            return "", f"<[{id}]>", ""
        part = _PART.search(tag)
        id = self._spell(part.group()) if part else None
        if part is None or id is None:
            return tag, "", ""
        return tag[: part.start()], f"<[{id}]>", tag[part.end() :]

    def _terminal(self, body: str) -> str:
        name = f"TEXT{len(self._rules)}"
        self._rules.append(f"{name}: {body}")
        return name

    def _text_rule(self, pattern: str, banned: Sequence[str], lazy: bool = False) -> str:
        """A rule for the text that ``pattern`` matches and that does not begin as ``banned`` do."""
        if banned:
            # Only the name of a terminal, in capitals, may stand for an intersection.
            pattern = self._terminal(f"{pattern} & ~/({'|'.join(banned)})(.|\\n)*/")
        return self._rule(pattern, lazy)

    def _rule(self, body: str, lazy: bool = False) -> str:
        name = f"rule{len(self._rules)}"
        self._rules.append(f"{name}{'[lazy]' if lazy else ''}: {body}")
        return name


def _pattern(text: str) -> str:
    """A regular expression, as Lark has it, that matches ``text`` alone."""
    return regex_to_lark("".join(f"\\{char}" if char in _SIGNS else char for char in text), "")
