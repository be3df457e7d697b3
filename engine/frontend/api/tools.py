"""The tools that a chat may offer, and the choice among them. A custom tool takes a text; here it
becomes a function whose only argument is that text.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, PrivateAttr, model_validator

from .generate import MAX_PATTERN_CHARS
from .strict import Strict

MAX_TOOLS = 512
FIELD = "input"  # the argument of a custom tool

Name = Annotated[str, Field(min_length=1, max_length=256)]


class Function(Strict):
    """``parameters`` is a JSON schema."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function


class CustomGrammar(Strict):
    syntax: Literal["lark", "regex"]
    definition: Annotated[str, Field(max_length=MAX_PATTERN_CHARS)]


class CustomFormat(Strict):
    """``grammar`` is there with that type only."""

    type: Literal["text", "grammar"]
    grammar: CustomGrammar | None = None

    @model_validator(mode="after")
    def _complete(self) -> CustomFormat:
        if self.type == "grammar" and self.grammar is None:
            raise ValueError("grammar is missing in the format of a custom tool")
        return self


class CustomDefinition(Strict):
    name: Name
    description: str | None = None
    format: CustomFormat | None = None


class TextTool(Strict):
    """A tool that takes a text. Its grammar is shown to the model; a regex holds forced calls."""

    type: Literal["custom"]
    custom: CustomDefinition


class CustomFunction(Tool):
    """The function that stands for a custom tool. ``is_lark``: calls cannot be held to its
    grammar.
    """

    _is_lark: bool = PrivateAttr(default=False)

    @property
    def is_lark(self) -> bool:
        return self._is_lark

    @classmethod
    def of(cls, custom: CustomDefinition) -> CustomFunction:
        about, pattern = None, None
        grammar = None if custom.format is None else custom.format.grammar
        if grammar is not None and grammar.syntax == "regex":
            pattern = grammar.definition
        elif grammar is not None:
            about = f"Text that follows this grammar (Lark):\n{grammar.definition}"
        described = {} if custom.description is None else {"description": custom.description}
        parameters = custom_parameters(about, pattern)
        made = cls(type="function", function=Function(name=custom.name, parameters=parameters, **described))
        made._is_lark = about is not None
        return made


def custom_parameters(description: str | None, pattern: str | None) -> dict[str, Any]:
    """The schema of the function that stands for a custom tool; ``pattern`` is a regex of the whole
    text.
    """
    text: dict[str, Any] = {"type": "string"}
    if description:
        text["description"] = description
    if pattern is not None:
        text["pattern"] = f"^(?:{pattern})$"
    return {
        "type": "object",
        "properties": {FIELD: text},
        "required": [FIELD],
        "additionalProperties": False,
    }


def is_custom(value: Any) -> bool:
    """Whether an object of a body says that it is of a custom tool."""
    return isinstance(value, dict) and value.get("type") == "custom"


def _function_of(value: Any) -> Any:
    return CustomFunction.of(TextTool.model_validate(value).custom) if is_custom(value) else value


OfferedTool = Annotated[Tool, BeforeValidator(_function_of, json_schema_input_type=Tool | TextTool)]


class NamedFunction(Strict):
    name: str


class NamedTool(Strict):
    kind: ClassVar[str] = "function"  # the field of the body that has the name
    type: Literal["function"]
    function: NamedFunction


class NamedText(Strict):
    type: Literal["custom"]
    custom: NamedFunction


class NamedCustom(NamedTool):
    """A custom tool by name."""

    kind: ClassVar[str] = "custom"


def _named(value: Any) -> Any:
    if not is_custom(value):
        return value
    return NamedCustom(type="function", function=NamedText.model_validate(value).custom)


ChosenName = Annotated[NamedTool, BeforeValidator(_named, json_schema_input_type=NamedTool | NamedText)]


class AllowedFunctions(Strict):
    """``required``: a call of one of ``tools`` is forced, and all tools stay in the prompt, which
    keeps its cached prefix. ``auto``: the prompt shows only these.
    """

    mode: Literal["auto", "required"]
    tools: Annotated[list[ChosenName], Field(min_length=1, max_length=MAX_TOOLS)]


class AllowedTools(Strict):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedFunctions
