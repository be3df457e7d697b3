"""The body of /v1/messages: types and ranges, and what is refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, Tag, model_validator

from ..api.generate import MAX_STOPS, Stop
from ..api.strict import BOUNDED, Element, Strict
from ..api.tools import MAX_TOOLS, Name
from .dialect import by_type, of_type

# Fields that need a service beside the model, with the values that need none.
_SERVICES: dict[str, tuple[Any, ...]] = {"mcp_servers": ([],), "container": ()}


class TextBlock(Element):
    type: Literal["text"]
    text: str


class ThinkingBlock(Element):
    """Reasoning of an earlier turn; ``signature`` is not read."""

    type: Literal["thinking"]
    thinking: str


class RedactedThinkingBlock(Element):
    """Reasoning that only another server can read: it is left out."""

    type: Literal["redacted_thinking"]


class ToolUseBlock(Element):
    type: Literal["tool_use"]
    id: str
    name: Name
    input: dict[str, Any]


PlainBlock = Annotated[TextBlock, of_type("text")]


class ToolResultBlock(Element):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[PlainBlock] | None = None
    is_error: bool | None = None


_BLOCKS = {
    "text": "TextBlock",
    "thinking": "ThinkingBlock",
    "redacted_thinking": "RedactedThinkingBlock",
    "tool_use": "ToolUseBlock",
    "tool_result": "ToolResultBlock",
}


Block = Annotated[
    Annotated[TextBlock, Tag("TextBlock")]
    | Annotated[ThinkingBlock, Tag("ThinkingBlock")]
    | Annotated[RedactedThinkingBlock, Tag("RedactedThinkingBlock")]
    | Annotated[ToolUseBlock, Tag("ToolUseBlock")]
    | Annotated[ToolResultBlock, Tag("ToolResultBlock")],
    by_type(_BLOCKS, "text"),
    of_type(*_BLOCKS),
]


class MessageTurn(Element):
    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class InputTool(Strict):
    """A tool of the client. ``input_schema`` is a JSON schema; a prescribed ``type`` is custom."""

    type: Literal["custom"] | None = None
    name: Name
    description: str | None = None
    input_schema: dict[str, Any]


class ToolChoice(Strict):
    type: Literal["auto", "any", "tool", "none"]
    name: Name | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _complete(self) -> ToolChoice:
        if self.type == "tool" and self.name is None:
            raise ValueError("tool_choice.name is missing")
        return self


class ThinkingOptions(Strict):
    """``budget_tokens`` is accepted but not held."""

    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: Any = None


class OutputSchema(Strict):
    type: Literal["json_schema"]
    schema_: dict[str, Any] | bool = Field(alias="schema")


class OutputOptions(Strict):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputSchema | None = None


class CountRequest(Strict):
    """The fields from which the prompt is made. ``cache_control`` is accepted anywhere: all
    prefixes are cached.
    """

    model: str | None = None
    messages: Annotated[list[MessageTurn], Field(min_length=1), BOUNDED]
    system: str | Annotated[list[PlainBlock], BOUNDED] | None = None
    tools: (
        Annotated[
            list[Annotated[InputTool, of_type("custom", default="custom")]], Field(max_length=MAX_TOOLS)
        ]
        | None
    ) = None
    tool_choice: ToolChoice | None = None
    thinking: ThinkingOptions | None = None
    output_config: OutputOptions | None = None
    output_format: OutputSchema | None = None

    @model_validator(mode="after")
    def _alone(self) -> CountRequest:
        sent = self.model_extra or {}
        for name, neutral in _SERVICES.items():
            value = sent.get(name)
            if value is not None and value not in neutral:
                raise ValueError(f"{name} is not supported by this server")
        return self


class MessagesRequest(CountRequest):
    """Fields that no one reads are accepted: ``metadata``, ``service_tier``, context edits."""

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stop_sequences: Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    stream: bool | None = None
    metadata: Any = None
    service_tier: Any = None
    context_management: Any = None
