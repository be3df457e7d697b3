"""Turns a conversation into text: gives the model's chat template the messages in its own shape.

Any earlier answer of the server is accepted as a turn.
"""

from __future__ import annotations

from typing import Any

from ...text.tokenizer import Codec
from ..api.errors import ApiError, bad_request, shown
from ..api.outline import check_outline
from ..api.schemas import ChatMessage, ContentPart, Conversation
from .chat_template import render
from .earlier_calls import call_arguments_for, one_by_one
from .habits import THOUGHTS, Beside, Habits
from .roles import Fate

OWN_FIELDS = ("messages", "tools", "add_generation_prompt", "continue_final_message")
TEXT_PARTS = ("text", "input_text", "output_text")


def conversation_text(codec: Codec, habits: Habits, ask: Conversation) -> str:
    """The prompt text of a conversation. Raises ApiError."""
    options = dict(ask.chat_template_kwargs or {})
    for name in OWN_FIELDS:
        if name in options:
            text = f"chat_template_kwargs.{name} is not allowed: {name} is a field of the request"
            raise bad_request(text, "chat_template_kwargs")
    options = _effort(habits, ask) | options
    messages = [
        plain for index, message in enumerate(ask.messages) for plain in _plain(habits, index, message)
    ]
    if habits.one_call:
        messages = one_by_one(messages)
    tools = [tool.model_dump(exclude_unset=True) for tool in ask.shown_tools] or None
    options["add_generation_prompt"] = ask.opens_turn
    options["continue_final_message"] = bool(ask.continue_final_message)
    try:
        return render(codec, messages, tools, **options)
    except ApiError as error:
        _explain(habits, ask, error)
        raise


def continued(ask: Conversation) -> str | None:
    """The text of the last message if the reply is to continue it, else None."""
    return content_of(len(ask.messages) - 1, ask.messages[-1]) if ask.continue_final_message else None


def content_of(index: int, message: ChatMessage) -> str:
    """The text of message number ``index``. Raises ApiError where there is more than text."""
    if message.content is None or isinstance(message.content, str):
        return message.content or ""
    return "\n".join(_part_text(index, part) for part in message.content)


def _part_text(index: int, part: ContentPart) -> str:
    refusal = (part.model_extra or {}).get("refusal")
    if part.type == "refusal" and isinstance(refusal, str):
        return refusal
    if part.type not in TEXT_PARTS or part.text is None:
        raise bad_request(
            f"messages[{index}].content: only text parts are supported (got {part.type!r})", "messages"
        )
    return part.text


def _effort(habits: Habits, ask: Conversation) -> dict[str, Any]:
    """The template's variables for ``reasoning_effort``: none turns the thinking off, any other
    turns it on where a template does not think by itself and the client sets no switch.
    """
    effort, thinking = ask.reasoning_effort, habits.thinking
    if effort is None:
        return {}
    if effort != "none":
        chosen = any(name in (ask.chat_template_kwargs or {}) for name in thinking.switches)
        return {"reasoning_effort": effort} | dict.fromkeys(() if chosen else thinking.must_ask, True)
    options: dict[str, Any] = dict.fromkeys(thinking.switches, False)
    return options | ({"reasoning_effort": effort} if thinking.reads_none else {})


def _plain(habits: Habits, index: int, message: ChatMessage) -> list[dict[str, Any]]:
    """A message as the template takes it: content as text, reasoning under all names, arguments
    as text or object, a role that it writes. Two where content and calls must stand apart.
    """
    plain = message.model_dump(exclude_none=True, exclude={"tool_calls", "function_call"})
    plain["role"] = _role(habits, index, message.role)
    content = plain["content"] = content_of(index, message)
    thoughts = message.reasoning if message.reasoning is not None else message.reasoning_content
    if thoughts is not None:
        plain.update(dict.fromkeys(THOUGHTS, thoughts))
    calls = _calls(habits, index, message)
    if not calls:  # templates test for the key, not for its value
        return [plain]
    plain["tool_calls"] = calls
    if content and habits.beside is Beside.TOGETHER and (thoughts is None or habits.all_beside):
        return [plain]
    plain["content"] = None if habits.null_content else ""
    if not content or habits.beside is Beside.CALLS_ALONE:
        return [plain]
    text = {name: value for name, value in plain.items() if name != "tool_calls"} | {"content": content}
    calls_alone = {name: value for name, value in plain.items() if name not in THOUGHTS}
    return [text, calls_alone]


def _role(habits: Habits, index: int, role: str) -> str:
    """The role under which the template writes message number ``index``. Raises ApiError where it
    would leave the message out.
    """
    name = habits.roles.written_as(role, index)
    if habits.roles.fate(name, index) is Fate.DROPPED:
        place = "as the first message" if index == 0 else "after the first message"
        raise bad_request(
            f"messages[{index}].role: the model's chat template writes no message of role {shown(role)}"
            f" {place}",
            f"messages[{index}].role",
        )
    return name


def _explain(habits: Habits, ask: Conversation, error: ApiError) -> None:
    """Raises a better ApiError where the template has refused a role that it never writes."""
    for index, message in enumerate(ask.messages):
        name = habits.roles.written_as(message.role, index)
        if habits.roles.fate(name, index) is Fate.REFUSED:
            text = f"messages[{index}].role {shown(message.role)}: {error.detail}"
            raise bad_request(text, f"messages[{index}].role") from error


def _calls(habits: Habits, index: int, message: ChatMessage) -> list[dict[str, Any]]:
    calls = [call.model_dump(exclude_none=True, exclude={"function"}) for call in message.tool_calls or ()]
    functions = [call.function for call in message.tool_calls or ()]
    if not functions and message.function_call is not None:  # the field before there were several calls
        calls, functions = [{}], [message.function_call]
    for number, function in enumerate(functions):
        if isinstance(function.arguments, str):
            where = f"messages[{index}].tool_calls[{number}].function.arguments"
            check_outline(function.arguments.encode(), where, "messages")
    return [
        {
            **call,
            "type": "function",
            "function": {
                **function.model_dump(exclude_none=True, exclude={"arguments"}),
                "arguments": call_arguments_for(habits, function.arguments),
            },
        }
        for call, function in zip(calls, functions, strict=True)
    ]
