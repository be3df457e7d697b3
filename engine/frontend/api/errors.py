"""Errors as the API shows them: one shape everywhere, with a status, a message and the field at
fault.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import msgspec
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from starlette.exceptions import HTTPException
from starlette.responses import Response

TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    413: "RequestTooLargeError",
    429: "RateLimitError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}
MAX_SHOWN = 80
_SHOULD = "Input should be "
_MEMBERS = frozenset({"str", "int", "float", "bool", "list"})  # of unions, as pydantic writes them into paths


class ApiError(HTTPException):
    """An error a client is to see. ``retry_after`` is in seconds; ``param`` names the field of the
    request at fault.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, retry_after: float | None = None
    ) -> None:
        headers = None if retry_after is None else {"Retry-After": str(max(1, math.ceil(retry_after)))}
        super().__init__(status, message, headers)
        self.param = param


def bad_request(message: str, param: str | None = None) -> ApiError:
    return ApiError(400, message, param)


def error_body(status: int, message: str, param: str | None = None) -> bytes:
    """The JSON document of an error."""
    kind = TYPES.get(status, TYPES[400] if status < 500 else TYPES[500])
    return msgspec.json.encode({"error": {"message": message, "type": kind, "param": param, "code": status}})


def error_response(error: HTTPException) -> Response:
    param = error.param if isinstance(error, ApiError) else None
    body = error_body(error.status_code, error.detail, param)
    return Response(body, error.status_code, dict(error.headers or {}), "application/json")


def from_validation(error: ValidationError) -> ApiError:
    """A pydantic failure as a 400 that names the field, what is wrong and (shortened) what was
    given.
    """
    failures = error.errors(include_url=False)
    first = min(failures, key=_rank)
    text = first["msg"].removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        return bad_request(f"The body is not valid JSON: {text.removeprefix('Invalid JSON: ')}")
    if first["type"] == "value_error":  # a check across fields: its text starts with the field
        return bad_request(text, text.split(" ", 1)[0])
    param = _field(first["loc"])
    if first["type"] == "missing":
        return bad_request(f"{param}: {text}", param)
    if text.startswith(_SHOULD):  # what the other members of a union take
        others = (
            item["msg"]
            for item in failures
            if item["msg"].startswith(_SHOULD) and _field(item["loc"]) == param
        )
        text = " or ".join(
            [text, *(other.removeprefix(_SHOULD) for other in dict.fromkeys(others) if other != text)]
        )
    given = f"(got {shown(first['input'])})"
    return (
        bad_request(f"{param}: {text} {given}", param)
        if param
        else bad_request(f"{text.replace('Input', 'The body', 1)} {given}")
    )


def shown(value: Any) -> str:
    """``value`` for a message, cut to a length that fits one and written as in JSON."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, str):
        text = repr(value[:MAX_SHOWN])
    else:
        text = json.dumps(
            value[:MAX_SHOWN] if isinstance(value, list) else value, ensure_ascii=False, default=str
        )
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."


def _rank(failure: ErrorDetails) -> tuple[bool, int]:
    """Of the failures of a union's members the one that got furthest says most; a plain type
    mismatch says least.
    """
    return failure["type"].endswith("_type"), -_field(failure["loc"]).count(".") - _field(
        failure["loc"]
    ).count("[")


def _field(location: Sequence[int | str]) -> str:
    """``("messages", 0, "content", "str")`` as ``messages[0].content``: pydantic names the member
    of a union in the path.
    """
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not (part in _MEMBERS or "[" in part or part[:1].isupper() or part.startswith("constrained")):
            path += f".{part[:MAX_SHOWN]}" if path else part[:MAX_SHOWN]
    return path
