"""The log line of a request: its kind, its answer's status, its times. Contains no prompts or
answers, and no value that a client sent as a field.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response

from ..api.errors import ApiError, error_response
from ..dialects.messages_errors import messages_error_response, speaks_messages
from ..reply import Reply

RECORD_KEY = "lockstep.record"
POLLED = frozenset({b"/health", b"/ready", b"/metrics", b"/load", b"/ping"})
MAX_TEXT = 200
_log = logging.getLogger("lockstep.frontend.requests")


@dataclass(slots=True, eq=False)
class RequestRecord:
    """One HTTP request. ``path`` is as sent, without its query; ``began`` in monotonic seconds;
    ``status`` 0: no answer yet, or in the end that the client has gone.
    """

    id: str
    method: str
    path: bytes
    began: float
    status: int = 0
    refusal: str = ""
    reply: Reply | None = None

    def log(self) -> None:
        """Writes the line, except for a routine probe."""
        status = self.status or 499
        if self.routine:
            return
        level = logging.WARNING if status >= 500 or self._failed else logging.INFO
        if _log.isEnabledFor(level):
            total = time.monotonic() - self.began
            start = f"request id={self.id} method={self.method} path={self.plain_path} status={status}"
            _log.log(level, " ".join([start, *self._generated(), f"total={total:.3f}", *self._refused()]))

    @property
    def routine(self) -> bool:
        """A probe that was answered well: those come every second."""
        return self.path in POLLED and 0 < self.status < 400

    @property
    def plain_path(self) -> str:
        return _plain(self.path)

    @property
    def why_refused(self) -> str:
        """The message of the request's error without values that a client sent; empty if none."""
        error = None if self.reply is None else self.reply.error
        return _without_values(self.refusal or ("" if error is None else error.detail))

    @property
    def _failed(self) -> bool:
        return self.reply is not None and self.reply.error is not None and self.reply.error.status_code >= 500

    def _generated(self) -> Iterator[str]:
        """Tokens; seconds from the submission to the engine's start and from the request's arrival
        to the first token, of the first choice; and the finish reasons of the choices.
        """
        if self.reply is None:
            return
        generations = self.reply.generations
        usage = self.reply.usage()
        yield f"prompt_tokens={usage['prompt_tokens']}"
        yield f"cached_tokens={usage['prompt_tokens_details']['cached_tokens']}"
        yield f"completion_tokens={usage['completion_tokens']}"
        if started := [item.started - item.submitted for item in generations if item.started]:
            yield f"queue={min(started):.3f}"
        if first := [item.first for item in generations if item.first]:
            yield f"first_token={min(first) - self.began:.3f}"
        reasons = dict.fromkeys(item.finish_reason for item in generations if item.finish_reason is not None)
        if reasons:
            yield f"finish={','.join(reasons)}"

    def _refused(self) -> Iterator[str]:
        if refusal := self.why_refused:
            yield f"refusal={json.dumps(refusal)}"


def refuse(scope: MutableMapping[str, Any], error: ApiError) -> Response:
    """The answer to a refused request, which its line in the log will name."""
    record = scope[RECORD_KEY]
    record.refusal = error.detail
    if speaks_messages(scope["path"]):
        return messages_error_response(error, record.id)
    return error_response(error)


def _without_values(message: str) -> str:
    """An error's message, shortened, without the quoted value, which may be a prompt."""
    text = message.partition(" (got ")[0]
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 3] + "..."


def _plain(path: bytes) -> str:
    """The path as one word of printable ASCII."""
    text = "".join(chr(byte) if 0x21 <= byte <= 0x7E else f"%{byte:02X}" for byte in path[:MAX_TEXT])
    return text if len(path) <= MAX_TEXT else text + "..."
