"""Properties of a chat template, found by rendering probes once, when the model is loaded."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import msgspec

from ...text.tokenizer import Codec
from ..api.errors import ApiError
from .chat_template import render
from .roles import PROBE_TEXT, Roles, learn_roles

PROBE_NAME, PROBE_VALUE, SECOND_NAME = "probe_function", "probe_value", "second_function"
PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": PROBE_NAME,
        "description": "A probe.",
        "parameters": {
            "type": "object",
            "properties": {"key": {"type": "string", "description": "A key."}},
            "required": ["key"],
        },
    },
}
BROKEN_ARGUMENTS = f'{{"key": "{PROBE_VALUE}'
THOUGHTS = ("reasoning", "reasoning_content", "thinking")  # fields of a message; gpt-oss reads the last
SWITCHES = ("enable_thinking", "thinking")  # Qwen3 and GLM; DeepSeek-V3.1
USER = {"role": "user", "content": "x"}

_log = logging.getLogger("lockstep.frontend")


class Beside(Enum):
    """The way to give a message that has both content and calls."""

    TOGETHER = "together"
    APART = "apart"  # as two messages
    CALLS_ALONE = "calls alone"


@dataclass(frozen=True, slots=True)
class Thinking:
    """The ways to ask a template for reasoning or for none. ``switches``: variables that turn it
    off when false. ``must_ask``: it is off by default, and those variables turn it on.
    ``reads_none``: the template reads a ``reasoning_effort`` of none.
    """

    switches: tuple[str, ...] = ()
    reads_none: bool = False
    must_ask: tuple[str, ...] = ()

    @property
    def can_stop(self) -> bool:
        return bool(self.switches) or self.reads_none


@dataclass(frozen=True, slots=True)
class Habits:
    """Properties in which chat templates differ.

    ``text_arguments``: it takes the arguments of calls as JSON text, not as objects.
    ``null_content``: it takes null, not empty text, as content of a message with calls alone.
    ``shows_tools``: the prompt depends on ``tools``.
    ``raw_arguments``: it writes arguments that are text as they are, so they need not be JSON.
    ``all_beside``: it takes reasoning too in a message with content and calls.
    ``one_call``: of several calls of a message it writes one.
    """

    text_arguments: bool = False
    null_content: bool = False
    shows_tools: bool = False
    raw_arguments: bool = False
    all_beside: bool = True
    one_call: bool = False
    beside: Beside = Beside.TOGETHER
    thinking: Thinking = field(default_factory=Thinking)
    roles: Roles = field(default_factory=Roles)


def learn_habits(codec: Codec) -> Habits:
    """Tries the ways to write a call of an earlier turn; the first one whose prompt shows the
    call's name and argument wins, else the usual one. Then probes the properties that depend on it.
    """
    if codec.chat_template is None:
        return Habits()
    shows_tools = PROBE_NAME in (_probe(codec, [USER], [PROBE_TOOL]) or "")
    thinking = _learn_thinking(codec)
    roles = learn_roles(codec.chat_template, lambda messages: _probe(codec, messages))
    for text_arguments, null_content in ((False, False), (False, True), (True, False), (True, True)):
        arguments = {"key": PROBE_VALUE}
        given = msgspec.json.encode(arguments).decode() if text_arguments else arguments
        content = None if null_content else ""
        if _shows_call(_probe(codec, _turn(content, given))):
            return Habits(
                text_arguments=text_arguments,
                null_content=null_content,
                shows_tools=shows_tools,
                raw_arguments=BROKEN_ARGUMENTS in (_probe(codec, _turn(content, BROKEN_ARGUMENTS)) or ""),
                all_beside=_probe(codec, _turn(PROBE_TEXT, given, thoughts=PROBE_TEXT)) is not None,
                one_call=SECOND_NAME
                not in (_probe(codec, _turn(content, given, second=True)) or SECOND_NAME),
                beside=_learn_beside(codec, content, given),
                thinking=thinking,
                roles=roles,
            )
    return Habits(shows_tools=shows_tools, thinking=thinking, roles=roles)


def _turn(
    content: str | None,
    arguments: Any,
    before: bool = False,
    thoughts: str | None = None,
    second: bool = False,
) -> list[dict[str, Any]]:
    """A turn with a call and its result; ``before``, the content comes in a message of its own."""
    function = {"name": PROBE_NAME, "arguments": arguments}
    calls = [{"id": "probe0001", "type": "function", "function": function}]
    if second:
        calls.append({**calls[0], "id": "probe0002", "function": {**function, "name": SECOND_NAME}})
    return [
        USER,
        *([{"role": "assistant", "content": PROBE_TEXT}] if before else []),
        {
            "role": "assistant",
            "content": content,
            "tool_calls": calls,
            **({} if thoughts is None else dict.fromkeys(THOUGHTS, thoughts)),
        },
        {"role": "tool", "content": "y", "name": PROBE_NAME, "tool_call_id": "probe0001"},
    ]


def _shows_call(text: str | None) -> bool:
    return text is not None and PROBE_NAME in text and PROBE_VALUE in text and "None" not in text


def _learn_beside(codec: Codec, content: str | None, arguments: Any) -> Beside:
    """Finds the way in which the prompt shows both the content and the calls of a message."""
    for way, turn in (
        (Beside.TOGETHER, _turn(PROBE_TEXT, arguments)),
        (Beside.APART, _turn(content, arguments, before=True)),
    ):
        text = _probe(codec, turn)
        if _shows_call(text) and PROBE_TEXT in (text or ""):
            return way
    _log.warning("the chat template leaves out the text of earlier messages that have tool calls too")
    return Beside.CALLS_ALONE


def _learn_thinking(codec: Codec) -> Thinking:
    off = {name: _probe(codec, [USER], None, **{name: False}) for name in SWITCHES}
    switches = tuple(
        name
        for name, text in off.items()
        if text is not None and text != _probe(codec, [USER], None, **{name: True})
    )
    none = _probe(codec, [USER], reasoning_effort="none")
    plain = _probe(codec, [USER])
    return Thinking(
        switches,
        reads_none=none is not None and none != _probe(codec, [USER], reasoning_effort="high"),
        must_ask=tuple(name for name in switches if off[name] == plain),
    )


def _probe(
    codec: Codec, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None, **options: Any
) -> str | None:
    """The prompt of a conversation, None where the template refuses it."""
    try:
        return render(codec, messages, tools, add_generation_prompt=True, **options)
    except ApiError:
        return None
