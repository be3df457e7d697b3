"""Errors in the shape of /v1/messages."""

from __future__ import annotations

import msgspec
from starlette.exceptions import HTTPException
from starlette.responses import Response

PATH = "/v1/messages"
OVERLOADED = 529
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def speaks_messages(path: str) -> bool:
    """Whether clients of ``path`` expect this shape."""
    return path == PATH or path.startswith(f"{PATH}/")


def messages_error(error: HTTPException, request_id: str) -> bytes:
    """The JSON document of an error."""
    status = error.status_code
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    detail = {"type": kind, "message": error.detail}
    return msgspec.json.encode({"type": "error", "error": detail, "request_id": request_id})


def messages_error_response(error: HTTPException, request_id: str) -> Response:
    """The answer. 503 is ``overloaded_error`` in this dialect."""
    status = OVERLOADED if error.status_code == 503 else error.status_code
    body = messages_error(error, request_id)
    return Response(body, status, dict(error.headers or {}), "application/json")
