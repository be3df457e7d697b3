"""Turns a conversation into text: finds out what the model's chat template can do, and gives it the
messages in its own shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from ...text.tokenizer import Codec
from ..api.errors import ApiError, bad_request
from ..api.outline import check_outline
from ..api.schemas import ChatMessage, Conversation
from .chat_template import render

OWN_FIELDS = ("messages", "tools", "add_generation_prompt", "continue_final_message")
PROBE_NAME, PROBE_VALUE = "probe_function", "probe_value"
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


@dataclass(frozen=True, slots=True)
class Habits:
    """The points in which chat templates differ, found by rendering probes.

    ``text_arguments``: it takes the arguments of calls as JSON text, not as objects.
    ``null_content``: it takes null, not empty text, as content of a message with calls alone.
    ``shows_tools``: the prompt depends on ``tools``.
    """

    text_arguments: bool = False
    null_content: bool = False
    shows_tools: bool = False


def learn_habits(codec: Codec) -> Habits:
    """Tries the ways to write a call of an earlier turn; the first one whose prompt shows the
    call's name and argument wins, else the usual one.
    """
    if codec.chat_template is None:
        return Habits()
    shows_tools = PROBE_NAME in (_probe(codec, [{"role": "user", "content": "x"}]) or "")
    for text_arguments, null_content in ((False, False), (False, True), (True, False), (True, True)):
        arguments = {"key": PROBE_VALUE}
        function = {
            "name": PROBE_NAME,
            "arguments": msgspec.json.encode(arguments).decode() if text_arguments else arguments,
        }
        call = {"id": "probe0001", "type": "function", "function": function}
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": None if null_content else "", "tool_calls": [call]},
            {"role": "tool", "content": "y", "name": PROBE_NAME, "tool_call_id": "probe0001"},
        ]
        text = _probe(codec, messages, with_tools=False)
        if text is not None and PROBE_NAME in text and PROBE_VALUE in text and "None" not in text:
            return Habits(text_arguments, null_content, shows_tools)
    return Habits(shows_tools=shows_tools)


def _probe(codec: Codec, messages: list[dict[str, Any]], with_tools: bool = True) -> str | None:
    try:
        return render(codec, messages, [PROBE_TOOL] if with_tools else None, add_generation_prompt=True)
    except ApiError:
        return None


def conversation_text(codec: Codec, habits: Habits, ask: Conversation) -> str:
    """The prompt text of a conversation. Raises ApiError."""
    options = dict(ask.chat_template_kwargs or {})
    if ask.reasoning_effort is not None:
        options.setdefault("reasoning_effort", ask.reasoning_effort)
    for name in OWN_FIELDS:
        if name in options:
            text = f"chat_template_kwargs.{name} is not allowed: {name} is a field of the request"
            raise bad_request(text, "chat_template_kwargs")
    messages = [_plain(habits, index, message) for index, message in enumerate(ask.messages)]
    tools = [tool.model_dump(exclude_unset=True) for tool in ask.tools] if ask.tools else None
    options["add_generation_prompt"] = ask.opens_turn
    options["continue_final_message"] = bool(ask.continue_final_message)
    return render(codec, messages, tools, **options)


def continued(ask: Conversation) -> str | None:
    """The text of the last message if the reply is to continue it, else None."""
    return content_of(len(ask.messages) - 1, ask.messages[-1]) if ask.continue_final_message else None


def content_of(index: int, message: ChatMessage) -> str:
    """The text of message number ``index``. Raises ApiError where there is more than text."""
    if message.content is None or isinstance(message.content, str):
        return message.content or ""
    texts = []
    for part in message.content:
        if part.type != "text" or part.text is None:
            raise bad_request(
                f"messages[{index}].content: only text parts are supported (got {part.type!r})", "messages"
            )
        texts.append(part.text)
    return "\n".join(texts)


def _plain(habits: Habits, index: int, message: ChatMessage) -> dict[str, Any]:
    """A message as the template takes it: content as text, reasoning under both names, arguments
    as text or object.
    """
    plain = message.model_dump(exclude_none=True)
    content = content_of(index, message)
    plain["content"] = None if message.tool_calls and not content and habits.null_content else content
    thoughts = message.reasoning if message.reasoning is not None else message.reasoning_content
    if thoughts is not None:
        plain["reasoning"] = plain["reasoning_content"] = thoughts
    if not message.tool_calls:
        plain.pop("tool_calls", None)  # templates test for the key, not for its value
    for number, call in enumerate(plain.get("tool_calls", ())):
        where = f"messages[{index}].tool_calls[{number}].function.arguments"
        call["function"]["arguments"] = _arguments(habits, call["function"].get("arguments", "{}"), where)
    return plain


def _arguments(habits: Habits, given: str | dict[str, Any], where: str) -> str | dict[str, Any]:
    if habits.text_arguments:
        return given if isinstance(given, str) else msgspec.json.encode(given).decode()
    if not isinstance(given, str):
        return given
    check_outline(given.encode(), where, "messages")
    try:
        return msgspec.json.decode(given or "{}", type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError) as error:
        raise bad_request(f"{where}: not a JSON object: {error}", "messages") from error
