"""Reads named server-sent events."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import httpx


@dataclass(frozen=True)
class Event:
    name: str
    data: dict[str, Any]


def events_of(answer: httpx.Response) -> list[Event]:
    """All events of a stream, without a final ``[DONE]``."""
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = []
    for part in answer.text.removesuffix("data: [DONE]\n\n").removesuffix("\n\n").split("\n\n"):
        name, data = part.split("\n")
        assert name.startswith("event: ") and data.startswith("data: ")
        events.append(Event(name[7:], json.loads(data[6:])))
    return events
