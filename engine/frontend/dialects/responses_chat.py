"""/v1/responses as a chat."""

from __future__ import annotations

from typing import Any, assert_never

import msgspec
from pydantic import TypeAdapter

from ..api.errors import ApiError
from ..api.schemas import ChatRequest
from ..api.tools import FIELD
from ..reply import Reply
from .chat_turns import ChatTurns, text_of
from .dialect import as_chat, shared_fields
from .hidden_reasoning import read_hidden
from .renames import Renames
from .responses_body import (
    AllowedChoice,
    ChosenTool,
    CustomCallItem,
    CustomOutputItem,
    CustomTool,
    FunctionCallItem,
    FunctionOutputItem,
    FunctionTool,
    GrammarSyntax,
    InputItem,
    MessageItem,
    ReasoningItem,
    ResponsesRequest,
)
from .responses_story import ResponseStory

_NAMES = (
    (r"(?:max_tokens|max_completion_tokens)\b", "max_output_tokens"),
    (r"response_format\.json_schema\.schema", "text.format.schema"),
    (r"response_format\b", "text.format"),
    (r"reasoning_effort\b", "reasoning.effort"),
    (r"tools(\[\d+\])\.custom\.format\.grammar\b", r"tools\1.format"),
    (r"tools(\[\d+\])\.(?:function|custom)\b", r"tools\1"),
    (r"tool_choice\.allowed_tools\.tools(\[\d+\])\.function\b", r"tool_choice.tools\1"),
    (r"tool_choice\.function\b", "tool_choice"),
)
_BODY: TypeAdapter[ResponsesRequest] = TypeAdapter(ResponsesRequest)


class ResponsesAsked:
    """A request to /v1/responses, and its translation into a chat."""

    def __init__(self, body: ResponsesRequest) -> None:
        """Raises ApiError."""
        self.body = body
        turns = _turns(body)
        self._renames = Renames(_NAMES, "input", turns.places)
        self.chat: ChatRequest = as_chat(_chat_fields(body) | {"messages": turns.messages}, self._renames)

    @classmethod
    def validate_python(cls, document: Any, /) -> ResponsesAsked:
        """Raises ValidationError or ApiError."""
        return cls(_BODY.validate_python(document))

    def blamed(self, error: ApiError) -> ApiError:
        return self._renames.apply(error)

    def narrator(self, reply: Reply) -> ResponseStory:
        return ResponseStory(self.body, self.chat, reply)

    def document(self, reply: Reply) -> dict[str, Any]:
        return self.narrator(reply).whole()


def _chat_fields(body: ResponsesRequest) -> dict[str, Any]:
    effort = None if body.reasoning is None else body.reasoning.effort
    fields = {
        "model": body.model,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "max_completion_tokens": body.max_output_tokens,
        "parallel_tool_calls": body.parallel_tool_calls,
        "reasoning_effort": effort,
        "tools": [_tool(tool) for tool in body.tools] if body.tools else None,
        "tool_choice": _choice(body),
        "response_format": None if _forces(body) else _response_format(body),
        "stream": body.stream,
    }
    if body.truncation == "auto":
        fields["truncate_prompt_tokens"] = -1
    return shared_fields(body) | fields


def _tool(tool: FunctionTool | CustomTool) -> dict[str, Any]:
    if isinstance(tool, FunctionTool):
        function = tool.model_dump(include={"name", "description", "parameters"}, exclude_unset=True)
        return {"type": "function", "function": function}
    custom = tool.model_dump(include={"name", "description"}, exclude_unset=True)
    if isinstance(tool.format, GrammarSyntax):
        grammar = {"syntax": tool.format.syntax, "definition": tool.format.definition}
        custom["format"] = {"type": "grammar", "grammar": grammar}
    return {"type": "custom", "custom": custom}


def _choice(body: ResponsesRequest) -> str | dict[str, Any] | None:
    match body.tool_choice:
        case ChosenTool(name=name):
            return _named(name)
        case AllowedChoice(mode=mode, tools=tools):
            allowed = {"mode": mode, "tools": [_named(tool.name) for tool in tools]}
            return {"type": "allowed_tools", "allowed_tools": allowed}
        case other:
            return other


def _forces(body: ResponsesRequest) -> bool:
    """Whether a call is forced. There is then no text to which a format could apply."""
    choice = body.tool_choice
    required = choice == "required" or (isinstance(choice, AllowedChoice) and choice.mode == "required")
    return required or isinstance(choice, ChosenTool)


def _named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def _response_format(body: ResponsesRequest) -> dict[str, Any] | None:
    format = None if body.text is None else body.text.format
    if format is None or format.type != "json_schema":
        return None if format is None else {"type": format.type}
    return {"type": "json_schema", "json_schema": {"name": format.name, "schema": format.schema_}}


def _turns(body: ResponsesRequest) -> ChatTurns:
    """The conversation. Raises ApiError."""
    turns = ChatTurns()
    if body.instructions is not None:
        turns.add("system", body.instructions, "instructions")
    if isinstance(body.input, str):
        turns.add("user", body.input, "input")
        return turns
    for index, item in enumerate(body.input):
        _add(turns, item, f"input[{index}]")
    return turns


def _add(turns: ChatTurns, item: InputItem, place: str) -> None:
    match item:
        case MessageItem(role="assistant"):
            turns.content(text_of(item.content, place, "content"), place, joins=False)
        case MessageItem():
            turns.add(item.role, text_of(item.content, place, "content"), place)
        case FunctionCallItem():
            turns.call(item.call_id, item.name, item.arguments, place)
        case CustomCallItem():
            arguments = msgspec.json.encode({FIELD: item.input}).decode()
            turns.call(item.call_id, item.name, arguments, place)
        case FunctionOutputItem() | CustomOutputItem():
            turns.result(item.call_id, text_of(item.output, place, "output"), place)
        case ReasoningItem():
            text = text_of(item.content, place, "content")
            text = text or read_hidden(item.encrypted_content or "")
            text = text or text_of(item.summary, place, "summary")
            if text:
                turns.reasoning(text, place)
        case _:
            assert_never(item)
