"""Base classes of request bodies: no coercion, and a cost that a body's faults cannot drive up."""

from __future__ import annotations

from typing import Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, GetCoreSchemaHandler, model_validator
from pydantic_core import CoreSchema, PydanticCustomError


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
    after each of them; without it one call into the library would validate them all.
    """

    @model_validator(mode="after")
    def _yield(self) -> Self:
        return self


def at_most(count: int) -> BeforeValidator:
    """Refuses a larger dict before its items are looked at, because all bad ones are reported."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > count:
            raise PydanticCustomError(
                "too_long", "Dictionary should have at most {most} items", {"most": count}
            )
        return value

    return BeforeValidator(check)
