"""The OpenAPI document: FastAPI's, with the bodies, answers, errors and keys of each operation.

Routes take and give raw bytes, so FastAPI knows their paths and nothing of the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from ..api.agent_answers import MessagesErrorAnswer
from ..api.answers import ErrorAnswer
from ..dialects.messages_errors import OVERLOADED, speaks_messages
from .keys import OPEN_PATHS
from .operations import OPERATIONS, Operation

Document = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
_NAMED_EVENTS = (
    "With `stream`: server-sent events. Each is a line `event: TYPE` and a line `data: {...}` of that type."
)
_EVENTS = (
    "With `stream`: server-sent events. Each is a line `data: {...}` with a chunk of the answer, or after a "
    'failure `data: {"error": {...}}`; the last one is `data: [DONE]`.'
)
_ERRORS = {
    400: "The request is not valid; `param` names the field",
    401: "No valid key was given",
    404: "There is no such model",
    408: "The request was not complete in time",
    409: "Another one is under way",
    413: "The body is too large",
    415: "The body is compressed",
    500: "The server has failed",
    503: "The server is starting, draining or full",
}
_MESSAGES_ERRORS = {status: text for status, text in _ERRORS.items() if status not in (409, 503)} | {
    OVERLOADED: _ERRORS[503]
}
_OTHER = "Any other error: of HTTP, of the path, of the server"
_ERROR_HEADERS = {401: ("WWW-Authenticate",), 503: ("Retry-After",), OVERLOADED: ("Retry-After",)}
_HEADERS = {
    "X-Request-Id": "The request's id in the server's log: the client's own, or a new one",
    "Retry-After": "Seconds after which to try again",
    "WWW-Authenticate": "The scheme of keys: Bearer",
}
_KEYS = {
    "ApiKey": "One of the recipe's frontend.api_keys",
    "AdminKey": "The recipe's frontend.admin_key; without one these paths are closed",
}


def complete(plain: Callable[[], Document], needs_key: bool) -> Document:
    """The whole document. ``plain`` makes FastAPI's; ``needs_key``: there are API keys."""
    document = plain()
    for path, methods in document["paths"].items():
        operation = OPERATIONS[path]
        for told in methods.values():
            told["security"] = _security(path, needs_key)
            told["responses"] = _responses(path, operation, bool(told["security"]))
            told["parameters"] = [*told.get("parameters", ()), {"$ref": "#/components/parameters/RequestId"}]
            if operation.bodies:
                told["requestBody"] = _body(operation)
    document["components"] = {
        "schemas": _schemas(OPERATIONS.values()),
        "headers": {
            name: {"description": text, "schema": {"type": "string"}} for name, text in _HEADERS.items()
        },
        "parameters": {"RequestId": _request_id()},
        "responses": _errors("Error", _ERRORS, ErrorAnswer)
        | _errors("MessagesError", _MESSAGES_ERRORS, MessagesErrorAnswer),
        "securitySchemes": {
            name: {"type": "http", "scheme": "bearer", "description": text} for name, text in _KEYS.items()
        },
    }
    return document


def _security(path: str, needs_key: bool) -> list[Document]:
    if path.startswith("/admin"):
        return [{"AdminKey": []}]
    return [{"ApiKey": []}] if needs_key and path not in OPEN_PATHS else []


def _responses(path: str, operation: Operation, keyed: bool) -> Document:
    statuses = sorted((*operation.errors, 401) if keyed else operation.errors)
    content: Document = {}
    if operation.answers:
        content["application/json"] = {"schema": _any_of(operation.answers)}
    else:
        content["text/plain"] = {"schema": {"type": "string"}}
    if operation.streams:
        told = _NAMED_EVENTS if path in ("/v1/responses", "/v1/messages") else _EVENTS
        content["text/event-stream"] = {"schema": {"type": "string", "description": told}}
    success = {"description": operation.success, "headers": _headers(), "content": content}
    name = "MessagesError" if speaks_messages(path) else "Error"
    errors = {str(status): {"$ref": f"#/components/responses/{name}{status}"} for status in statuses}
    return {str(operation.status): success, **errors, "default": {"$ref": f"#/components/responses/{name}"}}


def _body(operation: Operation) -> Document:
    content = {"schema": _any_of(operation.bodies), "example": operation.example}
    return {"required": operation.body_required, "content": {"application/json": content}}


def _errors(name: str, descriptions: dict[int, str], model: type[BaseModel]) -> Document:
    """The errors of one shape, by status; one without a status covers all others."""
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}}
    errors = {
        f"{name}{status}": {
            "description": text,
            "headers": _headers(*_ERROR_HEADERS.get(status, ())),
            "content": content,
        }
        for status, text in descriptions.items()
    }
    return errors | {name: {"description": _OTHER, "headers": _headers(), "content": content}}


def _headers(*more: str) -> Document:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in ("X-Request-Id", *more)}


def _request_id() -> Document:
    schema = {"type": "string", "pattern": "^[!-~]{1,128}$"}
    text = "An id for this request; it is echoed and written to the server's log"
    return {"name": "X-Request-Id", "in": "header", "required": False, "description": text, "schema": schema}


def _any_of(models: tuple[type[BaseModel], ...]) -> Document:
    choices = [{"$ref": f"#/components/schemas/{model.__name__}"} for model in models]
    return {"anyOf": choices} if choices[1:] else choices[0]


def _schemas(operations: Iterable[Operation]) -> Document:
    """The schemas of all bodies and answers. Roles are listed, though a template may know more."""
    used: dict[type[BaseModel], None] = {ErrorAnswer: None, MessagesErrorAnswer: None}
    for operation in operations:
        used |= dict.fromkeys((*operation.bodies, *operation.answers))
    _, definitions = models_json_schema(
        [(model, "validation") for model in used], ref_template="#/components/schemas/{model}"
    )
    schemas: Document = definitions["$defs"]
    schemas["ChatMessage"]["properties"]["role"] = {"type": "string", "enum": list(ROLES), "title": "Role"}
    return schemas
