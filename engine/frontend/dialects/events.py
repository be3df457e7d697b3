"""Named server-sent events as bytes."""

from __future__ import annotations

from typing import Any

import msgspec

encode = msgspec.json.encode


def event(kind: str, fields: dict[str, Any]) -> bytes:
    """An event whose data has its name as ``type`` and ``fields``."""
    return b"event: %s\ndata: %s\n\n" % (kind.encode(), encode({"type": kind, **fields}))


def event_head(kind: str, fields: dict[str, Any]) -> bytes:
    """The bytes of an event up to the value of a further field, which ends with a colon."""
    return b"event: %s\ndata: %s" % (kind.encode(), encode({"type": kind, **fields})[:-1])
