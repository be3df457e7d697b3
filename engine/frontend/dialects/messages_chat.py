"""/v1/messages as a chat."""

from __future__ import annotations

from typing import Any, assert_never

from pydantic import TypeAdapter

from ..api.errors import ApiError
from ..api.schemas import ChatRequest
from ..reply import Reply
from .chat_turns import ChatTurns
from .dialect import as_chat, shared_fields
from .messages_body import (
    CountRequest,
    InputTool,
    MessagesRequest,
    MessageTurn,
    RedactedThinkingBlock,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
)
from .messages_story import MessageStory
from .renames import Renames

_NAMES = (
    (r"max_completion_tokens\b", "max_tokens"),
    (r"response_format\.json_schema\.schema", "output_config.format.schema"),
    (r"response_format\b", "output_config.format"),
    (r"reasoning_effort\b", "thinking.type"),
    (r"tools(\[\d+\])\.function\.parameters", r"tools\1.input_schema"),
    (r"tools(\[\d+\])\.function\b", r"tools\1"),
    (r"tool_choice\.function\b", "tool_choice"),
    (r"stop(\[\d+\]|\b)", r"stop_sequences\1"),
)
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_FAILED = "Error: "
_BODY: TypeAdapter[MessagesRequest] = TypeAdapter(MessagesRequest)
_COUNT: TypeAdapter[CountRequest] = TypeAdapter(CountRequest)


class MessagesAsked:
    """A request to /v1/messages, or for a count of its tokens, and its translation into a chat."""

    def __init__(self, body: CountRequest) -> None:
        """Raises ApiError."""
        turns, prefilled = _turns(body)
        self._renames = Renames(_NAMES, "messages", turns.places)
        fields = _chat_fields(body) | {"messages": turns.messages}
        if prefilled:
            fields["continue_final_message"] = True
        self.chat: ChatRequest = as_chat(fields, self._renames)

    @classmethod
    def validate_python(cls, document: Any, /) -> MessagesAsked:
        """Raises ValidationError or ApiError."""
        return cls(_BODY.validate_python(document))

    def blamed(self, error: ApiError) -> ApiError:
        return self._renames.apply(error)

    def narrator(self, reply: Reply) -> MessageStory:
        return MessageStory(reply)

    def document(self, reply: Reply) -> dict[str, Any]:
        return self.narrator(reply).whole()


class CountAsked(MessagesAsked):
    """A request to /v1/messages/count_tokens."""

    @classmethod
    def validate_python(cls, document: Any, /) -> CountAsked:
        """Raises ValidationError or ApiError."""
        return cls(_COUNT.validate_python(document))


def _chat_fields(body: CountRequest) -> dict[str, Any]:
    choice = body.tool_choice
    fields: dict[str, Any] = shared_fields(body)
    if isinstance(body, MessagesRequest):
        fields |= {
            "max_tokens": body.max_tokens,
            "stop": body.stop_sequences or fields.get("stop"),
            "temperature": body.temperature,
            "top_p": body.top_p,
            "top_k": body.top_k,
            "stream": body.stream,
        }
    fields |= {"model": body.model, "tools": [_tool(tool) for tool in body.tools] if body.tools else None}
    if choice is not None:
        named = {"type": "function", "function": {"name": choice.name}}
        fields["tool_choice"] = _CHOICES.get(choice.type, named)
        fields["parallel_tool_calls"] = False if choice.disable_parallel_tool_use else None
    return fields | _output_fields(body) | _thinking_fields(body, fields.get("chat_template_kwargs"))


def _tool(tool: InputTool) -> dict[str, Any]:
    function = {"name": tool.name}
    if tool.description is not None:
        function["description"] = tool.description
    return {"type": "function", "function": {**function, "parameters": tool.input_schema}}


def _output_fields(body: CountRequest) -> dict[str, Any]:
    options = body.output_config
    format = body.output_format or (None if options is None else options.format)
    effort = None if options is None else options.effort
    fields: dict[str, Any] = {"reasoning_effort": "xhigh" if effort == "max" else effort}
    forced = body.tool_choice is not None and body.tool_choice.type in ("any", "tool")
    if format is not None and not forced:  # a forced call leaves no text that could have a format
        fields["response_format"] = {"type": "json_schema", "json_schema": {"schema": format.schema_}}
    return fields


def _thinking_fields(body: CountRequest, given: Any) -> dict[str, Any]:
    """Template variables that turn thinking on or off, under each name that a template may read."""
    if body.thinking is None:
        return {}
    if body.thinking.type == "disabled":
        return {"reasoning_effort": "none"}
    switches = {"enable_thinking": True, "thinking": True}
    return {"chat_template_kwargs": switches | given if isinstance(given, dict) else switches}


def _turns(body: CountRequest) -> tuple[ChatTurns, bool]:
    """The conversation, and whether the reply goes on with its last message. Raises ApiError."""
    turns = ChatTurns()
    if body.system is not None:
        turns.add("system", _text(body.system), "system")
    for index, message in enumerate(body.messages):
        _add(turns, message, f"messages[{index}]")
    last = turns.messages[-1] if turns.messages else {}
    prefilled = last.get("role") == "assistant" and "tool_calls" not in last and bool(last["content"])
    return turns, prefilled


def _text(content: str | list[TextBlock] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(block.text for block in content)


def _add(turns: ChatTurns, message: MessageTurn, place: str) -> None:
    turns.close()
    if isinstance(message.content, str):
        if message.role == "assistant":
            turns.content(message.content, place, joins=True)
        else:
            turns.add(message.role, message.content, place)
        return
    blocks = message.content
    texts: list[str] = []
    for index, block in enumerate(blocks):
        match block:
            case TextBlock() if message.role == "assistant":
                turns.content(block.text, place, joins=True)
            case TextBlock():
                texts.append(block.text)
            case ThinkingBlock():
                turns.reasoning(block.thinking, place)
            case ToolUseBlock():
                turns.call(block.id, block.name, block.input, place)
            case ToolResultBlock():
                text = _text(block.content)
                failed = block.is_error and not text.lower().startswith("error")
                text = f"{_FAILED}{text}" if failed else text
                turns.result(block.tool_use_id, text, f"{place}.content[{index}]")
            case RedactedThinkingBlock():
                pass
            case _:
                assert_never(block)
    if texts or (not blocks and message.role != "assistant"):
        turns.add(message.role, "\n".join(texts), place)
