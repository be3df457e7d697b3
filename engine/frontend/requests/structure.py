"""Structured output: writes response_format, structured_outputs and forced tools as a grammar that
a rank can follow.

The grammar covers a whole reply: reasoning, where the model may begin with it, then content of the
shape asked for, or calls in the model's own format. It is checked here against a vocabulary of
bytes, so a schema or pattern that cannot be followed is refused before anything is queued.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import msgspec
from llguidance import LLMatcher, LLTokenizer

from ..api.errors import bad_request
from ..api.generate import Generate
from ..api.schemas import ChatRequest, NamedTool
from ..formats.choice import Manner
from ..formats.lark import Lark, Spell
from ..formats.reader import SPACE

MAX_GRAMMAR_BYTES = 256 * 1024
MAX_MESSAGE_CHARS = 300
_END = 256  # the end token of the vocabulary of bytes
_PLACE = re.compile(r"^(at )?\d+\(\d+\): ")
_CONTEXT = re.compile(r"\n *\d+ \| |\n<state>")


class GrammarCheck:
    """Checks that a grammar can be followed. Threads may share it: a matcher serves one call."""

    def __init__(self) -> None:
        self._tokenizer = LLTokenizer(_Bytes())  # type: ignore[arg-type]

    def __call__(self, grammar: str, param: str) -> None:
        """Raises ApiError, naming the field ``param``."""
        if len(grammar) > MAX_GRAMMAR_BYTES:
            raise bad_request(
                f"{param}: its grammar has {len(grammar)} bytes, at most {MAX_GRAMMAR_BYTES} are allowed",
                param,
            )
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise bad_request(f"{param}: {_reason(matcher.get_error())}", param)
        if not matcher.is_accepting() and not any(matcher.compute_bitmask()[: _END // 8]):
            raise bad_request(f"{param}: it allows no text at all", param)


class _Bytes:
    """A vocabulary of the 256 bytes and an end token, in the shape that llguidance takes."""

    is_tokenizer_wrapper = True
    eos_token_id = _END
    bos_token_id = None
    special_token_ids = (_END,)
    tokens = (*(bytes([byte]) for byte in range(256)), b"<end>")

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


def grammar_of(ask: Generate, manner: Manner | None, spell: Spell, check: GrammarCheck) -> str:
    """The grammar of replies to ``ask``; empty where they are free. Raises ApiError."""
    content = _content(ask, manner)
    forced = isinstance(ask, ChatRequest) and ask.forced_tool
    if content is None and not forced:
        return ""
    if content is not None:
        param, write = content
        plain = Lark(_as_text)
        check(plain.finish(write(plain)), param)
    else:
        param = "tools"

    def whole(lark: Lark) -> str:
        branches = [] if content is None else [content[1](lark)]
        if isinstance(ask, ChatRequest) and manner is not None and manner.tools is not None:
            branches.append(_calls(ask, manner, lark))
        return _after_reasoning(lark.either(branches), manner, lark)

    plain = Lark(_as_text)
    check(plain.finish(whole(plain)), param)
    real = Lark(spell)
    return real.finish(whole(real))


def _as_text(tag: str) -> int | None:
    return None


def begins_with(ask: Generate, tag: str) -> bool:
    """Whether the text that the client prescribes may begin with ``tag``, by its own words. A
    pattern that names the tag anywhere counts.
    """
    wanted = ask.structured_outputs
    if wanted is None:
        return False
    if wanted.regex is not None:
        return tag in wanted.regex.replace("\\", "")
    return any(choice.lstrip(SPACE).startswith(tag) for choice in wanted.choice or ())


def _content(ask: Generate, manner: Manner | None) -> tuple[str, Callable[[Lark], str]] | None:
    """The request field that restricts the content, and the function that writes its grammar; None
    where the content is free.
    """
    if ask.structured_outputs is not None:
        field = "structured_outputs"
        wanted = ask.structured_outputs
        if wanted.regex is not None:
            regex = wanted.regex
            # The parser takes such a beginning for reasoning.
            tags = manner.formats.reasoning if manner is not None else None
            first = tags.open if tags is not None else ""
            return f"{field}.regex", lambda lark: lark.regex(regex, first=first)
        if wanted.choice is not None:
            choices = wanted.choice
            return f"{field}.choice", lambda lark: lark.either(map(lark.text, choices))
        schema = _schema(wanted.json_, f"{field}.json")
        return f"{field}.json", lambda lark: lark.json(schema)
    if ask.response_format is None or ask.response_format.type == "text":
        return None
    if ask.response_format.type == "json_object":
        return "response_format", lambda lark: lark.json({"type": "object"})
    assert ask.response_format.json_schema is not None
    wanted_schema = ask.response_format.json_schema.schema_
    return "response_format.json_schema.schema", lambda lark: lark.json(wanted_schema)


def _schema(given: Any, param: str) -> Any:
    if not isinstance(given, str):
        return given
    try:
        return msgspec.json.decode(given)
    except (msgspec.DecodeError, RecursionError) as error:
        raise bad_request(f"{param}: not valid JSON: {error}", param) from error


def _calls(ask: ChatRequest, manner: Manner, lark: Lark) -> str:
    """The expression of the calls that the reply may make."""
    assert manner.formats.tools is not None and manner.tools is not None
    write = manner.formats.tools(manner.tools).write
    if isinstance(ask.tool_choice, NamedTool):
        return write(lark, [ask.tool_choice.function.name], many=False)
    return write(lark, ask.tool_names, many=not manner.one_call)


def _after_reasoning(body: str, manner: Manner | None, lark: Lark) -> str:
    """``body`` after the reasoning that the prompt has opened or the model may open."""
    tags = manner.formats.reasoning if manner is not None else None
    if manner is None or tags is None or manner.answering:
        return body
    # A call is one wherever it begins, so none may begin before the reasoning is closed.
    tools = manner.formats.tools if manner.tools is not None else None
    rest = f"{lark.until(tags.close, tools.openings if tools is not None else ())} {lark.line_breaks(2)}"
    return f"{rest} {body}" if manner.thinking else f"({lark.tag(tags.open)} {rest})? {body}"


def _reason(error: str) -> str:
    """The first line of an error, without the parts of our own grammar that it quotes."""
    text = _PLACE.sub("", _CONTEXT.split(error, maxsplit=1)[0])
    return " ".join(text.split())[:MAX_MESSAGE_CHARS]


def refuse_without_end(eos_ids: tuple[int, ...]) -> None:
    """Raises ApiError for a model whose texts cannot end."""
    if not eos_ids:
        raise bad_request("Structured output needs a model with an end-of-sequence id; this one has none")
