"""The body of /v1/responses: types and ranges, and what is refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, Tag, model_validator

from ..api.generate import MAX_PATTERN_CHARS
from ..api.schemas import ContentPart, ReasoningEffort
from ..api.strict import BOUNDED, Element, Strict
from ..api.tools import MAX_TOOLS, Name
from .dialect import by_type, of_type

# Fields that need a memory of earlier responses, with the values that need none.
STATEFUL: dict[str, tuple[Any, str]] = {
    "previous_response_id": (None, "the server keeps no responses: send the whole conversation as input"),
    "conversation": (None, "the server keeps no conversations: send all of it as input"),
    "background": (False, "the server keeps no responses: use stream"),
    "prompt": (None, "the server keeps no prompts: send it as instructions and input"),
}
Include = Literal[
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
    "web_search_call.results",
]


class MessageItem(Element):
    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[ContentPart]


class FunctionCallItem(Element):
    type: Literal["function_call"]
    call_id: str
    name: Name
    arguments: str


class FunctionOutputItem(Element):
    type: Literal["function_call_output"]
    call_id: str
    output: str | list[ContentPart]


class CustomCallItem(Element):
    type: Literal["custom_tool_call"]
    call_id: str
    name: Name
    input: str


class CustomOutputItem(Element):
    type: Literal["custom_tool_call_output"]
    call_id: str
    output: str | list[ContentPart]


class ReasoningItem(Element):
    """``encrypted_content`` is read only if this server has written it."""

    type: Literal["reasoning"]
    summary: list[ContentPart] | None = None
    content: list[ContentPart] | None = None
    encrypted_content: str | None = None


_ITEMS = {
    "message": "MessageItem",
    "function_call": "FunctionCallItem",
    "function_call_output": "FunctionOutputItem",
    "custom_tool_call": "CustomCallItem",
    "custom_tool_call_output": "CustomOutputItem",
    "reasoning": "ReasoningItem",
}


InputItem = Annotated[
    Annotated[MessageItem, Tag("MessageItem")]
    | Annotated[FunctionCallItem, Tag("FunctionCallItem")]
    | Annotated[FunctionOutputItem, Tag("FunctionOutputItem")]
    | Annotated[CustomCallItem, Tag("CustomCallItem")]
    | Annotated[CustomOutputItem, Tag("CustomOutputItem")]
    | Annotated[ReasoningItem, Tag("ReasoningItem")],
    by_type(_ITEMS, "message"),
    of_type(*_ITEMS, default="message"),
]


class FunctionTool(Strict):
    """``strict`` is accepted but changes nothing: forced calls always follow the schema."""

    type: Literal["function"]
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class TextSyntax(Strict):
    type: Literal["text"]


class GrammarSyntax(Strict):
    type: Literal["grammar"]
    syntax: Literal["lark", "regex"]
    definition: Annotated[str, Field(max_length=MAX_PATTERN_CHARS)]


class CustomTool(Strict):
    """A tool that takes a text. Its grammar is shown to the model; a regex holds forced calls."""

    type: Literal["custom"]
    name: Name
    description: str | None = None
    format: TextSyntax | GrammarSyntax | None = None


_TOOLS = {"function": "FunctionTool", "custom": "CustomTool"}
OfferedTool = Annotated[
    Annotated[FunctionTool, Tag("FunctionTool")] | Annotated[CustomTool, Tag("CustomTool")],
    by_type(_TOOLS, "function"),
    of_type(*_TOOLS),
]


class ChosenTool(Strict):
    type: Literal["function", "custom"]
    name: Name


class AllowedChoice(Strict):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[ChosenTool], Field(min_length=1, max_length=MAX_TOOLS)]


class TextFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(default=None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _complete(self) -> TextFormat:
        if self.type == "json_schema" and self.schema_ is None:
            raise ValueError("text.format.schema is missing")
        return self


class TextOptions(Strict):
    """``verbosity`` changes nothing."""

    format: TextFormat | None = None
    verbosity: Any = None


class ReasoningOptions(Strict):
    """``summary`` changes nothing: reasoning is shown as it is, never summarized."""

    effort: ReasoningEffort | None = None
    summary: Any = None


class ResponsesRequest(Strict):
    """Fields that no one reads are accepted: ``store``, ``metadata``, ``user``, cache hints."""

    model: str | None = None
    input: str | Annotated[list[InputItem], Field(min_length=1), BOUNDED]
    instructions: str | None = None
    tools: Annotated[list[OfferedTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | AllowedChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_logprobs: int | None = None
    truncation: Literal["auto", "disabled"] | None = None
    include: list[Include] | None = None
    stream: bool | None = None
    store: bool | None = None
    metadata: dict[str, Any] | None = None
    previous_response_id: str | None = None
    background: bool | None = None

    @model_validator(mode="after")
    def _stateless(self) -> ResponsesRequest:
        sent = {**(self.model_extra or {}), **self.__dict__}
        for name, (neutral, advice) in STATEFUL.items():
            if sent.get(name) not in (None, neutral):
                raise ValueError(f"{name} is not supported: {advice}")
        if self.top_logprobs:
            raise ValueError("top_logprobs is not supported here: use /v1/chat/completions")
        if "message.output_text.logprobs" in (self.include or ()):
            raise ValueError(
                "include message.output_text.logprobs is not supported: use /v1/chat/completions"
            )
        return self

    @property
    def encrypts(self) -> bool:
        """Whether reasoning is also given as ``encrypted_content``."""
        return "reasoning.encrypted_content" in (self.include or ())

    @property
    def custom_names(self) -> frozenset[str]:
        return frozenset(tool.name for tool in self.tools or () if isinstance(tool, CustomTool))
