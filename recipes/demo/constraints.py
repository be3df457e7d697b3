"""Fields of a request that confine an answer to the form of right ones, not to their content."""

from __future__ import annotations

from typing import Any

from .cases.case import Case

ARITHMETIC = r"The answer is -?[0-9]{1,6}\."


def constraint(case: Case) -> dict[str, Any]:
    """A pattern for sums, a schema for objects, a forced call for calls; else nothing."""
    check = case.check
    if check.kind == "call":
        return {"tool_choice": "required"}
    if check.kind == "json":
        schema = {
            "type": "object",
            "properties": {
                name: {"type": "integer" if isinstance(value, int) else "string"}
                for name, value in check.value.items()
            },
            "required": list(check.value),
            "additionalProperties": False,
        }
        return {
            "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
        }
    return {"extra_body": {"structured_outputs": {"regex": ARITHMETIC}}} if check.kind == "number" else {}
