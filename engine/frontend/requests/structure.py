"""Structured output: writes response_format, structured_outputs and forced tools as a grammar that
a rank can follow.

The grammar covers a whole reply: reasoning, where the model may begin with it, then content of the
shape asked for, or calls in the model's own format. This module only writes it; the grammar desk
checks whether a schema or pattern can be followed, before anything is queued.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import msgspec

from ..api.errors import bad_request
from ..api.generate import Generate
from ..api.outline import check_outline
from ..api.schemas import ChatRequest
from ..api.tools import NamedTool
from ..formats.choice import Manner
from ..formats.lark import Lark, Spell
from ..formats.reader import SPACE
from ..grammars.claim import Claim
from .well_formed import check_parameters


def grammar_of(ask: Generate, manner: Manner | None, spell: Spell) -> tuple[Claim, ...]:
    """The grammar of replies to ``ask``: the last of the claims, none where replies are free. Those
    before it are its parts, so that an error names the field at fault. Raises ApiError.
    """
    content = _content(ask, manner)
    forced = isinstance(ask, ChatRequest) and ask.forced_tool
    if content is None and not forced:
        return ()
    lark, claims, branches = Lark(spell), [], []
    if content is not None:
        param, write = content
        claims.append(_claim(param, spell, write))
        tags = manner.formats.reasoning if manner is not None else None
        head = tags.head(lark) if tags is not None else ""
        branches.append(f"{head} {write(lark)}" if head else write(lark))
    else:
        param = "tools"
    if isinstance(ask, ChatRequest) and manner is not None and manner.tools is not None:
        claims.extend(_parameters(ask, manner, spell))
        branches.append(_calls(ask, manner, lark))
    claims.append(Claim(lark.finish(_after_reasoning(lark.either(branches), manner, lark)), param))
    return tuple(claims)


def _parameters(ask: ChatRequest, manner: Manner, spell: Spell) -> Iterator[Claim]:
    """A call of each tool that may be called, with its parameters. Raises ApiError."""
    assert manner.formats.tools is not None and manner.tools is not None
    write = manner.formats.tools(manner.tools).write
    names = {tool.function.name for tool in ask.callable_tools}
    if isinstance(ask.tool_choice, NamedTool):
        names = {ask.tool_choice.function.name}
    for index, tool in enumerate(ask.tools or ()):
        if tool.function.parameters and tool.function.name in names:
            where = f"tools[{index}].function.parameters"
            try:
                check_parameters(tool.function.parameters, where)
            except ValueError as error:
                raise bad_request(str(error), where) from None
            yield _claim(where, spell, partial(write, names=[tool.function.name], many=False))


def _claim(param: str, spell: Spell, write: Callable[[Lark], str]) -> Claim:
    """The claim of one field, whose grammar ``write`` writes. Raises ApiError."""
    lark = Lark(spell)
    try:
        return Claim(lark.finish(write(lark)), param)
    except ValueError as fault:
        raise bad_request(f"{param}: {fault}", param) from None
    except RecursionError:
        raise bad_request(f"{param}: it is nested too deeply", param) from None


def begins_with(ask: Generate, tag: str) -> bool:
    """Whether the text that the client prescribes may begin with ``tag``. A pattern that contains
    the tag anywhere counts.
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
    check_outline(given.encode(), param, param)
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
    names = [tool.function.name for tool in ask.callable_tools]
    return write(lark, names, many=not manner.one_call)


def _after_reasoning(body: str, manner: Manner | None, lark: Lark) -> str:
    """``body`` after the reasoning that the prompt has opened or the model may open."""
    tags = manner.formats.reasoning if manner is not None else None
    if manner is None or tags is None or manner.answering:
        return body
    tools = manner.formats.tools if manner.tools is not None else None
    return tags.before(lark, body, manner.thinking, tools.openings if tools is not None else ())


def refuse_without_end(eos_ids: tuple[int, ...]) -> None:
    """Raises ApiError for a model whose texts cannot end."""
    if not eos_ids:
        raise bad_request("Structured output needs a model with an end-of-sequence id; this one has none")
