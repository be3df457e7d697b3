"""Base classes of request bodies: no coercion, and a bounded cost of validating invalid bodies."""

from __future__ import annotations

from typing import Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, GetCoreSchemaHandler, model_validator
from pydantic_core import CoreSchema, PydanticCustomError

# Limit of one conversation: 40 to 90 ms of validation on an EPYC core, and a million tokens if each
# element has fifty.
MAX_ELEMENTS = 5 * 2**12
_LISTS = ("content", "output", "summary")
# Calls are two objects of a chat; as items of their own they become a message, too.
_MORE = {"tool_use": 1, "function_call": 2, "custom_tool_call": 2}


def _fail_fast(schema: Any) -> None:
    """Sets ``fail_fast`` for every list in a schema of pydantic's core."""
    if isinstance(schema, dict):
        if schema.get("type") == "list":
            schema["fail_fast"] = True
        schema = list(schema.values())
    if isinstance(schema, list | tuple):
        for part in schema:
            _fail_fast(part)


class Strict(BaseModel):
    """A request body without coercion between JSON types, NaN or infinity. Unknown fields are kept
    for inspection.

    A list fails at its first bad element: a million bad ones cost as much as one.
    """

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        _fail_fast(schema)
        return schema


class Element(Strict):
    """An object of which a body may hold thousands. Its validator in Python lets other threads run
    after each one; without it a single call into the library would validate all of them.
    """

    @model_validator(mode="after")
    def _yield(self) -> Self:
        return self


def _bounded(value: Any) -> Any:
    """Refuses a conversation of too many elements before any of them is looked at."""
    if isinstance(value, list) and num_elements(value) > MAX_ELEMENTS:
        raise PydanticCustomError(
            "too_long",
            "Input should have at most {most} messages, parts and calls; calls count more than once",
            {"most": MAX_ELEMENTS},
        )
    return value


BOUNDED = BeforeValidator(_bounded)


def num_elements(turns: list[Any]) -> int:
    """Messages, items or blocks with the parts and calls in them."""
    count = len(turns)
    for turn in turns:
        if not isinstance(turn, dict):
            continue
        kind = turn.get("type")
        count += _MORE.get(kind, 0) if isinstance(kind, str) else 0
        if isinstance(calls := turn.get("tool_calls"), list):
            count += 2 * len(calls)
        for name in _LISTS:
            if isinstance(inner := turn.get(name), list):
                count += num_elements(inner)
    return count


def at_most(count: int) -> BeforeValidator:
    """Refuses a larger dict before its items are looked at, because all bad ones are reported."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > count:
            raise PydanticCustomError(
                "too_long", "Dictionary should have at most {most} items", {"most": count}
            )
        return value

    return BeforeValidator(check)
