"""One endpoint's turn in a round: its requests, sent and timed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from .endpoint import Endpoint, Question, timed
from .figures import Round
from .timing import TimedRequest


@dataclass
class TurnProgress:
    """Requests of a turn, counted. ``title``: level, round and endpoint."""

    title: str
    asked: int
    sent: int = 0
    finished: int = 0
    failed: int = 0

    def __str__(self) -> str:
        in_flight = self.sent - self.finished - self.failed
        failed = f", {self.failed:,} failed" if self.failed else ""
        return f"{self.title}: {self.finished:,} of {self.asked:,} requests, {in_flight:,} in flight{failed}"


class Turn:
    """Sends ``questions`` when they are due; or, if ``most`` is given, as soon as fewer of them are
    in flight.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        questions: Sequence[Question],
        arrivals: Sequence[float],
        most: int | None,
        progress: TurnProgress,
    ) -> None:
        self.progress = progress
        self._endpoint, self._questions, self._arrivals = endpoint, questions, arrivals
        self._room, self._paced = asyncio.Semaphore(most or len(questions)), most is None
        self._timed: list[TimedRequest] = []
        self._began = 0.0

    async def run(self) -> Round:
        """Until the last request has ended."""
        self._began = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for due, question in zip(self._arrivals, self._questions, strict=True):
                if (wait := due - self._now()) > 0:
                    await asyncio.sleep(wait)
                await self._room.acquire()
                group.create_task(self._send(question, due if self._paced else self._now()))
        return Round(tuple(self._timed))

    def _now(self) -> float:
        return time.perf_counter() - self._began

    async def _send(self, question: Question, due: float) -> None:
        progress = self.progress
        progress.sent += 1
        found = await timed(self._endpoint, question, due, self._now)
        self._room.release()
        self._timed.append(found)
        if found.failure is None:
            progress.finished += 1
        else:
            progress.failed += 1
