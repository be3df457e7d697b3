"""Field names in errors: translates those of the chat back into those of the original request."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..api.errors import ApiError

_MESSAGE = re.compile(r"messages\[(\d+)\](?:\.tool_calls\[\d+\]\.function(\.\w+)?|(\.content|\.role))?")


@dataclass(frozen=True, slots=True)
class Renames:
    """``places`` are those of the chat's messages in the body; ``names`` are pairs of patterns and
    replacements, of which the first that matches the start of a field counts.
    """

    names: Sequence[tuple[str, str]]
    messages: str
    places: Sequence[str] = field(default_factory=list)

    def apply(self, error: ApiError) -> ApiError:
        param = self._renamed(error.param or "")
        message = _MESSAGE.sub(self._place, str(error.detail))
        if error.param and param != error.param:
            message = message.replace(error.param, param, 1)
        for pattern, name in self.names:
            message = re.sub(rf"^{pattern}", name, message)
        renamed = ApiError(error.status_code, message, param or None, headers=dict(error.headers or {}))
        return renamed if message != error.detail or param != (error.param or "") else error

    def _renamed(self, param: str) -> str:
        if param == "messages":
            return self.messages
        param = _MESSAGE.sub(self._place, param)
        for pattern, name in self.names:
            changed, count = re.subn(rf"^{pattern}", name, param)
            if count:
                return changed
        return param

    def _place(self, match: re.Match[str]) -> str:
        index = int(match[1])
        if index >= len(self.places):
            return match[0]
        return self.places[index] + (match[2] or match[3] or "")
