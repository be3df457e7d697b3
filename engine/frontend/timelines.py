"""Timelines of steps, asked of the controller: one at a time."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

from ..protocol.timeline import AskTimeline, StepSpans, TimelineEnd
from .api.errors import ApiError

PATIENCE = 10.0
"""Seconds beyond those asked that the controller may take."""


class Timelines:
    """Collects the spans of ranks. ``send`` sends to the controller."""

    def __init__(self, send: Callable[[AskTimeline], None]) -> None:
        self._send = send
        self._ids = itertools.count(1)
        self._id = 0
        self._spans: list[StepSpans] = []
        self._ended: asyncio.Future[TimelineEnd] | None = None

    async def take(self, steps: int, seconds: float) -> tuple[TimelineEnd, list[StepSpans]]:
        """The end of the timeline, and the spans of each step on each rank. Raises ApiError where
        nothing was recorded.
        """
        if self._ended is not None:
            raise ApiError(409, "Another timeline is being taken: ask again when it has ended")
        self._id, self._spans = next(self._ids), []
        self._ended = asyncio.get_running_loop().create_future()
        self._send(AskTimeline(self._id, steps, seconds))
        try:
            async with asyncio.timeout(seconds + PATIENCE):
                end = await self._ended
        except TimeoutError:
            reason = f"the controller did not end the timeline within {seconds + PATIENCE:g} s"
            if not self._spans:
                raise ApiError(503, reason, retry_after=1) from None
            end = TimelineEnd(self._id, reason)
        finally:
            self._ended = None
        if end.status != 200:
            raise ApiError(end.status, end.reason, retry_after=1 if end.status == 503 else None)
        return end, self._spans

    def on_spans(self, spans: StepSpans) -> None:
        if self._ended is not None:
            self._spans.append(spans)

    def on_end(self, end: TimelineEnd) -> None:
        if self._ended is not None and end.id == self._id and not self._ended.done():
            self._ended.set_result(end)
