"""Observers of requests in addition to log and metrics: spans for a collector, and a file with a
JSON line for each request. Neither ever fails or delays a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from ...protocol.specs import FrontendSpec
from ...tracing.context import context_of
from ..metrics.metrics import Metrics
from ..reply import Reply
from .line_file import LineFile
from .request_log import RequestRecord

if TYPE_CHECKING:
    from .spans import RequestSpan, RequestSpans

_log = logging.getLogger("lockstep.frontend")


@dataclass(slots=True)
class Observed:
    """A request under way. ``traceparent`` goes into the answer, unless it is empty."""

    record: RequestRecord
    trace_id: str = ""
    traceparent: bytes = b""
    span: RequestSpan | None = None


class Observers:
    """Those of one frontend; at least one of ``spans`` and ``lines``."""

    def __init__(self, spans: RequestSpans | None, lines: LineFile | None) -> None:
        self._spans = spans
        self._lines = lines

    def begin(self, record: RequestRecord, headers: Iterable[tuple[bytes, bytes]]) -> Observed:
        observed = Observed(record)
        try:
            caller = context_of(headers)
            if caller is not None:
                observed.trace_id = caller.trace_id
            if self._spans is not None and (span := self._spans.begin(record, caller)) is not None:
                observed.span = span
                observed.trace_id = span.context.trace_id
                observed.traceparent = span.context.traceparent
        except Exception:  # a fault here must not cost anybody an answer
            _log.exception("request %s is not traced", record.id)
        return observed

    def end(self, observed: Observed, route: str) -> None:
        """Handles the end of a request: answered, or its client has gone."""
        record = observed.record
        try:
            if self._spans is not None and observed.span is not None:
                self._spans.end(observed.span, record, route)
            if self._lines is not None and not record.routine:
                self._lines.put(_line(record, observed.trace_id))
        except Exception:
            _log.exception("request %s is not observed to its end", record.id)

    def close(self) -> None:
        if self._lines is not None:
            self._lines.close()
        if self._spans is not None:
            self._spans.close()


def observe(spec: FrontendSpec, metrics: Metrics) -> Observers | None:
    """The observers that the spec asks for, None if it asks for none: then nothing is imported for
    them. For the thread of the event loop, to which ``metrics`` belong.
    """
    if spec.access_log_file is None and spec.tracing is None:
        return None
    loop = asyncio.get_running_loop()

    def drops(kind: str) -> Callable[[int], None]:
        def dropped(count: int) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nothing reads the counts
                loop.call_soon_threadsafe(metrics.dropped, kind, count)

        return dropped

    lines = None if spec.access_log_file is None else LineFile(spec.access_log_file, drops("access_log_line"))
    spans = None
    if spec.tracing is not None:
        from .spans import RequestSpans

        spans = RequestSpans(spec.tracing, spec.name, spec.served_name, drops("span"))
    return Observers(spans, lines)


def _line(record: RequestRecord, trace_id: str) -> dict[str, Any]:
    """The line of a request, without prompts and answers. Times are seconds; ``time`` is that of
    the arrival, in UTC.
    """
    seconds = time.monotonic() - record.began
    arrived = datetime.fromtimestamp(time.time() - seconds, UTC)
    line: dict[str, Any] = {
        "time": arrived.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "id": record.id,
        "trace_id": trace_id or None,
        "method": record.method,
        "path": record.plain_path,
        "status": record.status or 499,
        "seconds": round(seconds, 6),
    }
    if record.reply is not None:
        line |= _generated(record.reply, record.began)
    if refusal := record.why_refused:
        line["refusal"] = refusal
    return line


def _generated(reply: Reply, began: float) -> dict[str, Any]:
    generations = reply.generations
    usage = reply.usage()
    queued = [item.started - item.submitted for item in generations if item.started]
    first = [item.first for item in generations if item.first]
    return {
        "model": reply.outline.model,
        "choices": len(generations),
        "prompt_tokens": usage["prompt_tokens"],
        "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
        "completion_tokens": usage["completion_tokens"],
        "reasoning_tokens": usage["completion_tokens_details"]["reasoning_tokens"],
        "preemptions": sum(item.num_preemptions for item in generations),
        "queue_seconds": round(min(queued), 6) if queued else None,
        "first_token_seconds": round(min(first) - began, 6) if first else None,
        "finish": list(dict.fromkeys(item.finish_reason for item in generations if item.finish_reason)),
    }
