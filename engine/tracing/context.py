"""The place of a request in a trace, as W3C Trace Context (Level 2) writes it into headers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_TRACEPARENT = re.compile(rb"(?!ff)([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_MAX_STATE = 8192  # bytes; the specification asks for 512 at least


@dataclass(frozen=True, slots=True)
class TraceContext:
    """Ids in lower-case hex. ``state`` is the header ``tracestate``, unread."""

    trace_id: str
    span_id: str
    sampled: bool
    state: str = ""

    @property
    def traceparent(self) -> bytes:
        return f"00-{self.trace_id}-{self.span_id}-{int(self.sampled):02x}".encode()


def context_of(headers: Iterable[tuple[bytes, bytes]]) -> TraceContext | None:
    """The caller's context. None without one, and for one that the specification calls invalid: it
    is to be ignored then.
    """
    parents: list[bytes] = []
    states: list[bytes] = []
    for name, value in headers:
        if name == b"traceparent":
            parents.append(value.strip())
        elif name == b"tracestate":
            states.append(value.strip())
    if len(parents) != 1 or (found := _TRACEPARENT.fullmatch(parents[0])) is None:
        return None
    version, trace_id, span_id, flags, rest = found.groups()
    if not trace_id.strip(b"0") or not span_id.strip(b"0") or (version == b"00" and rest is not None):
        return None
    state = b",".join(states)
    return TraceContext(
        trace_id.decode(),
        span_id.decode(),
        bool(int(flags, 16) & 1),
        state.decode("latin-1") if len(state) <= _MAX_STATE else "",
    )
