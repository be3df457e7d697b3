"""The story of a request, for /admin/requests/{id}: when it came, was submitted and started, where
it ran, how it ended. Contains no prompts or answers; nothing is recorded per token.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import Any

from ..requests.generation import Generation
from .request_log import RequestRecord

Document = dict[str, Any]

MOST = 1024  # stories of requests that have ended; one takes about 2 kB


class Stories:
    """Requests that are being answered, and the last ``MOST`` that have been. An id that a client
    uses again names the newest.
    """

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._open: dict[str, RequestRecord] = {}
        self._ended: OrderedDict[str, Document] = OrderedDict()

    def begin(self, record: RequestRecord) -> None:
        self._open[record.id] = record

    def end(self, record: RequestRecord) -> None:
        """Keeps the story of a request that asked for tokens; without its tokens."""
        if self._open.get(record.id) is record:
            del self._open[record.id]
        if record.reply is None:
            return
        self._ended.pop(record.id, None)
        self._ended[record.id] = _story(record, ended=True)
        if len(self._ended) > self._most:
            self._ended.popitem(last=False)

    def find(self, id: str) -> Document | None:
        record = self._open.get(id)
        if record is not None and record.reply is not None:
            return _story(record, ended=False)
        return self._ended.get(id)


def _story(record: RequestRecord, *, ended: bool) -> Document:
    """``seconds`` count from the request's arrival."""
    now = time.monotonic()
    generations = [] if record.reply is None else record.reply.generations
    return {
        "id": record.id,
        "path": record.path.decode("ascii", "replace"),
        "status": record.status or (499 if ended else None),
        "ended": ended,
        "arrived": round(time.time() - (now - record.began), 3),
        "seconds": round(now - record.began, 6),
        "choices": [_choice(generation, record.began) for generation in generations],
    }


def _choice(generation: Generation, began: float) -> Document:
    sampling = generation.submit.sampling
    return {
        "engine_id": generation.submit.request_id,
        "prompt_tokens": len(generation.prompt),
        "max_tokens": generation.max_tokens,
        "min_tokens": sampling.min_tokens,
        "priority": generation.submit.priority,
        "grammar": bool(generation.submit.grammar),
        "cached_tokens": generation.num_cached,
        "completion_tokens": len(generation.tokens),
        "preemptions": generation.num_preemptions,
        "lost_messages": generation.num_gaps,
        "finish": generation.finish_reason,
        "runs": generation.num_runs,
        "timeline": _timeline(generation, began),
    }


def _timeline(generation: Generation, began: float) -> list[Document]:
    """Events in the order of their times."""
    events: list[tuple[float, Document]] = []
    for name in ("submitted", "first", "last"):
        at = getattr(generation, name)
        if at:
            event = name if name == "submitted" else f"{name} token"
            events.append((at, {"event": event}))
    for number, run in enumerate(generation.runs):
        facts: Document = {"event": "started again" if number else "started", "data": run.data}
        facts |= {"epoch": run.epoch, "cached_tokens": run.num_cached, "preemptions": run.preemptions}
        if number:
            facts["tokens_before"] = run.num_tokens
        events.append((run.at, facts))
    events.sort(key=lambda event: event[0])
    return [{"seconds": round(at - began, 6), **facts} for at, facts in events]
