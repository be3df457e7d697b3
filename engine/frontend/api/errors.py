"""Errors of the API, all in one shape: status, message, and the field at fault."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import islice
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
    408: "RequestTimeoutError",
    409: "ConflictError",
    413: "RequestTooLargeError",
    415: "UnsupportedMediaTypeError",
    429: "RateLimitError",
    431: "RequestHeadTooLargeError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}
CLIENT_GONE = 499  # nobody sees it
MAX_SHOWN = 80
_SHOULD = "Input should be "
_IN_JSON = {  # pydantic names Python's types
    "model_type": "Input should be an object",
    "model_attributes_type": "Input should be an object",
    "dict_type": "Input should be an object",
    "list_type": "Input should be a valid array",
}
_MEMBERS = frozenset({"str", "int", "float", "bool", "list"})  # pydantic's names of members of unions


class ApiError(HTTPException):
    """An error to show to the client. ``param`` names the field at fault; ``retry_after`` is in
    seconds.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        retry_after: float | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        if retry_after is not None:
            headers = {**(headers or {}), "Retry-After": str(max(1, math.ceil(retry_after)))}
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
    """A 400 from a pydantic failure. It names the field, the fault and (shortened) the value."""
    failures = error.errors(include_url=False)
    for failure in failures:
        failure["msg"] = _IN_JSON.get(failure["type"], failure["msg"])
    first = min(failures, key=_rank)
    text = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":  # a check across fields, whose text starts with the field
        return bad_request(text, text.split(" ", 1)[0])
    param = _field(first["loc"])
    if first["type"] == "missing":
        return bad_request(f"{param}: {text}", param)
    if text.startswith(_SHOULD):  # a union: names what each of its members takes
        same_field = [item["msg"] for item in failures if _field(item["loc"]) == param]
        others = [other for other in dict.fromkeys(same_field) if other.startswith(_SHOULD) and other != text]
        text = " or ".join([text, *(other.removeprefix(_SHOULD) for other in others)])
    given = f"(got {shown(first['input'])})"
    if not param:
        return bad_request(f"{text.replace('Input', 'The body', 1)} {given}")
    return bad_request(f"{param}: {text} {given}", param)


def shown(value: Any) -> str:
    """``value`` for a message: written as in JSON, and shortened. The cost does not depend on its
    size.
    """
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, str):
        text = repr(value[:MAX_SHOWN])
    else:
        text = json.dumps(_start(value), ensure_ascii=False, default=str)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."


def _start(value: Any, levels: int = 2) -> Any:
    """The start of ``value``, more than is shown of it; deeper levels are dots."""
    if isinstance(value, str):
        return value[:MAX_SHOWN]
    if not isinstance(value, list | dict):
        return value
    if not levels:
        return "..."
    if isinstance(value, list):
        return [_start(item, levels - 1) for item in value[: MAX_SHOWN // 2]]
    items = islice(value.items(), MAX_SHOWN // 2)
    return {name[:MAX_SHOWN]: _start(item, levels - 1) for name, item in items}


def _rank(failure: ErrorDetails) -> tuple[bool, int, int]:
    """Sorts the failures of a union's members: the one deepest in the body, or farthest into a
    list, says most, and a plain type mismatch says least.
    """
    field = _field(failure["loc"])
    farthest = max((part for part in failure["loc"] if isinstance(part, int)), default=0)
    return failure["type"].endswith("_type"), -field.count(".") - field.count("["), -farthest


def _field(location: Sequence[int | str]) -> str:
    """``("messages", 0, "content", "str")`` as ``messages[0].content``; the last part is pydantic's
    name of a member of a union.
    """
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not (part in _MEMBERS or "[" in part or part[:1].isupper() or part.startswith("constrained")):
            path += f".{part[:MAX_SHOWN]}" if path else part[:MAX_SHOWN]
    return path
