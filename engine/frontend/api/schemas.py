"""The bodies that clients may send. Types and ranges are checked here; ``requests/prepare.py``
checks what depends on the model.

Unknown fields are accepted, because clients rely on it. The fields that chat and text completions
share are in ``generate.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, cast

import msgspec
from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from .generate import MAX_LOGPROBS, Generate, TokenId
from .strict import BOUNDED, Element, Strict
from .tools import (
    FIELD,
    MAX_TOOLS,
    AllowedTools,
    ChosenName,
    CustomFunction,
    Function,
    Name,
    NamedFunction,
    NamedTool,
    OfferedTool,
    Tool,
    is_custom,
)


class ContentPart(Element):
    type: str
    text: str | None = None


class CalledFunction(Strict):
    """``arguments`` is JSON as text, as the client got it. An object is accepted too, and null for
    no arguments.
    """

    name: Name
    arguments: str | dict[str, Any] | None = None


class ToolCall(Element):
    """A call of an earlier turn."""

    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunction


class GivenText(Strict):
    name: Name
    input: str


class TextCall(Element):
    """A call of a custom tool in an earlier turn."""

    id: str | None = None
    type: Literal["custom"]
    custom: GivenText


def _call_of(value: Any) -> Any:
    """The call of the function that stands for a custom tool."""
    if not is_custom(value):
        return value
    call = TextCall.model_validate(value)
    arguments = msgspec.json.encode({FIELD: call.custom.input}).decode()
    return ToolCall(
        id=call.id, type="function", function=CalledFunction(name=call.custom.name, arguments=arguments)
    )


EarlierCall = Annotated[ToolCall, BeforeValidator(_call_of, json_schema_input_type=ToolCall | TextCall)]


class ChatMessage(Element):
    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | list[ContentPart] | None = None
    tool_calls: list[EarlierCall] | None = None
    function_call: CalledFunction | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


# ``none`` is no thinking; the others are for the template to read.
ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]


class Conversation(Strict):
    """The fields from which a chat template makes a prompt."""

    messages: Annotated[list[ChatMessage], Field(min_length=1), BOUNDED]
    tools: Annotated[list[OfferedTool], Field(max_length=MAX_TOOLS)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    reasoning_effort: ReasoningEffort | None = None

    @model_validator(mode="after")
    def _one_ending(self) -> Conversation:
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message and add_generation_prompt exclude each other")
        return self

    @property
    def shown_tools(self) -> list[Tool]:
        """The tools in the prompt."""
        return self.tools or []

    @property
    def opens_turn(self) -> bool:
        """Whether the prompt ends with the opening of the reply."""
        return self.add_generation_prompt is not False and not self.continue_final_message


class ChatRequest(Generate, Conversation):
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenName | AllowedTools | None = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[list[Function], Field(max_length=MAX_TOOLS)] | None = None
    function_call: Literal["none", "auto"] | NamedFunction | None = None
    include_reasoning: bool | None = None
    echo: Literal[False] | None = None
    # Accepted for clients that always send them. They change nothing.
    prediction: Any = None
    service_tier: Any = None
    metadata: Any = None
    safety_identifier: Any = None
    prompt_cache_retention: Any = None
    verbosity: Any = None
    store: Any = None

    @model_validator(mode="after")
    def _functions(self) -> ChatRequest:
        """Turns the older fields ``functions`` and ``function_call`` into tools."""
        if self.functions and self.tools:
            raise ValueError("functions and tools exclude each other")
        if self.function_call is not None and self.tool_choice is not None:
            raise ValueError("function_call and tool_choice exclude each other")
        if isinstance(self.function_call, NamedFunction) and not self.functions:
            raise ValueError("function_call needs functions")
        if self.functions:
            self.tools = [Tool(type="function", function=function) for function in self.functions]
        if isinstance(self.function_call, NamedFunction):
            self.tool_choice = NamedTool(type="function", function=self.function_call)
        elif self.function_call is not None:
            self.tool_choice = self.function_call
        return self

    @model_validator(mode="after")
    def _tools(self) -> ChatRequest:
        if (self.forced_tool or isinstance(self.tool_choice, AllowedTools)) and not self.tools:
            raise ValueError("tool_choice needs tools")
        for place, name in self._chosen_names():
            if name not in self.tool_names:
                raise ValueError(f"{place} {name[:80]!r} is not one of tools")
        if self.forced_tool:
            self.refuse_endless("tool_choice")
            self._refuse_lark()
            if self.is_structured:
                raise ValueError(
                    "tool_choice that forces a call cannot be combined with response_format or"
                    " structured_outputs"
                )
        if len(set(self.tool_names)) != len(self.tool_names):
            raise ValueError("tools has two functions of the same name")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    def _refuse_lark(self) -> None:
        """Refuses to force a call that no grammar could hold: a Lark grammar inside of JSON."""
        named = self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None
        forced = {tool.function.name for tool in self.callable_tools} if named is None else {named}
        for index, tool in enumerate(self.tools or ()):
            if isinstance(tool, CustomFunction) and tool.is_lark and tool.function.name in forced:
                raise ValueError(
                    f"tools[{index}].custom.format.grammar.syntax lark cannot hold a forced call: use regex,"
                    " or tool_choice auto"
                )

    def _chosen_names(self) -> Iterator[tuple[str, str]]:
        """The functions that ``tool_choice`` names, with the places of their names."""
        match self.tool_choice:
            case NamedTool(function=function) as tool:
                yield f"tool_choice.{tool.kind}.name", function.name
            case AllowedTools(allowed_tools=allowed):
                for index, tool in enumerate(allowed.tools):
                    yield f"tool_choice.allowed_tools.tools[{index}].{tool.kind}.name", tool.function.name

    @property
    def tool_names(self) -> list[str]:
        return [tool.function.name for tool in self.tools or ()]

    @property
    def custom_names(self) -> frozenset[str]:
        """The tools that take a text."""
        return frozenset(tool.function.name for tool in self.tools or () if isinstance(tool, CustomFunction))

    @property
    def callable_tools(self) -> list[Tool]:
        """The tools that the reply may call, unless ``tool_choice`` is none."""
        if not isinstance(self.tool_choice, AllowedTools):
            return self.tools or []
        names = {name for _, name in self._chosen_names()}
        return [tool for tool in self.tools or () if tool.function.name in names]

    @property
    def shown_tools(self) -> list[Tool]:
        """The tools in the prompt: all, unless nothing else keeps the reply from calling some."""
        return self.tools or [] if self.forced_tool else self.callable_tools

    @property
    def forced_tool(self) -> bool:
        """Whether a tool must be called."""
        if isinstance(self.tool_choice, AllowedTools):
            return self.tool_choice.allowed_tools.mode == "required"
        return self.tool_choice is not None and self.tool_choice not in ("none", "auto")

    @property
    def offers_tools(self) -> bool:
        """Whether the reply may call a tool."""
        return bool(self.tools) and self.tool_choice != "none"

    @property
    def one_call(self) -> bool:
        """Whether the reply ends with its first call."""
        return self.parallel_tool_calls is False or bool(self.functions)

    @property
    def num_logprobs(self) -> int:
        """As in ``Sampling``: -1 for none, 0 for the chosen token alone."""
        return (self.top_logprobs or 0) if self.logprobs else -1

    @property
    def output_tokens(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


Prompt = str | list[str] | list[int] | list[list[int]]


class CompletionRequest(Generate):
    prompt: Prompt
    max_tokens: Annotated[int, Field(ge=0)] | None = 16
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _echo(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens must be at least 1 unless echo is true")
        if self.scores_prompt and self.max_tokens == 0 and (self.n or 1) > 1:
            raise ValueError(
                "n must be 1 when only the prompt's logprobs are asked for (max_tokens 0): all choices"
                " would be equal"
            )
        return self

    @property
    def scores_prompt(self) -> bool:
        return bool(self.echo) and self.logprobs is not None

    @property
    def num_logprobs(self) -> int:
        return -1 if self.logprobs is None else self.logprobs

    @property
    def output_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts as a list. A list whose first element is a token id is one prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return cast(list[list[int]], self.prompt)


GenerationRequest = ChatRequest | CompletionRequest


class TokenizeText(Strict):
    prompt: str
    model: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class TokenizeChat(Conversation):
    model: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


def _tokenize_kind(body: Any) -> str:
    return "TokenizeChat" if isinstance(body, dict) and body.get("messages") is not None else "TokenizeText"


TokenizeRequest = Annotated[
    Annotated[TokenizeText, Tag("TokenizeText")] | Annotated[TokenizeChat, Tag("TokenizeChat")],
    Discriminator(_tokenize_kind),
]


class DetokenizeRequest(Strict):
    tokens: list[TokenId]
    model: str | None = None
