"""The tools that a chat may offer, and the choice among them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from .strict import Strict

MAX_TOOLS = 512

Name = Annotated[str, Field(min_length=1, max_length=256)]


class Function(Strict):
    """``parameters`` is a JSON schema."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    name: str


class NamedTool(Strict):
    type: Literal["function"]
    function: NamedFunction


class AllowedFunctions(Strict):
    """``required``: a call of one of ``tools`` is forced, and all tools stay in the prompt, which
    keeps its cached prefix. ``auto``: the prompt shows only these.
    """

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TOOLS)]


class AllowedTools(Strict):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedFunctions
