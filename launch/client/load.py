"""Replays a trace against a server, open-loop: requests leave when they are due."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from ..simulation.trace import Trace
from .load_record import LoadRecord
from .server import Server, ServerError, ask, ask_json
from .traffic import EventReader, StreamUsage, read_events, request_body

_TURN = 0.1  # seconds between displays of progress

ShowProgress = Callable[[LoadRecord, float], None]
"""Called with the record and the seconds since the start."""


@dataclass(frozen=True)
class Target:
    """A model on a server."""

    server: Server
    model: str
    vocab_size: int


async def vocabulary_size(server: Server) -> int:
    """Raises ServerError."""
    found = await ask_json(server, "GET", "/tokenizer_info")
    size = found.get("vocab_size") if isinstance(found, dict) else None
    if not isinstance(size, int) or size < 1:
        raise ServerError("no vocabulary", f"{server.url}: /tokenizer_info has no vocab_size")
    return size


class Load:
    """Sends the requests of a trace. At most ``most`` are open; further ones are sent later, which
    the record shows.
    """

    def __init__(self, target: Target, trace: Trace, most: int) -> None:
        self.record = LoadRecord(trace.source, len(trace.requests))
        self._target, self._trace = target, trace
        self._room = asyncio.Semaphore(most)
        self._began = 0.0

    async def run(self, stop: asyncio.Event, show: ShowProgress) -> bool:
        """Until every request has ended (True), or ``stop`` is set."""
        self._began = time.perf_counter()
        sending = asyncio.create_task(self._send_all(), name="send the trace")
        stopping = asyncio.create_task(stop.wait(), name="stop")
        try:
            while not sending.done() and not stopping.done():
                await asyncio.wait((sending, stopping), timeout=_TURN, return_when=asyncio.FIRST_COMPLETED)
                show(self.record, self._now())
            if sending.done():
                sending.result()
                return True
            return False
        finally:
            for task in (sending, stopping):
                task.cancel()
            await asyncio.gather(sending, stopping, return_exceptions=True)

    def _now(self) -> float:
        return time.perf_counter() - self._began

    async def _send_all(self) -> None:
        async with asyncio.TaskGroup() as group:
            for number, request in enumerate(self._trace.requests):
                if (wait := request.seconds - self._now()) > 0:
                    await asyncio.sleep(wait)
                await self._room.acquire()
                group.create_task(self._send(number))

    async def _send(self, number: int) -> None:
        try:
            await self._ask(number)
        except ServerError as error:
            self.record.fail(error.kind, str(error))
        finally:
            self._room.release()

    async def _ask(self, number: int) -> None:
        target, request, record = self._target, self._trace.requests[number], self.record
        body = request_body(self._trace, number, target.model, target.vocab_size)
        record.begin(request.seconds, self._now())
        events = EventReader()
        usage = StreamUsage()
        count = 0
        first = last = 0.0
        async with ask(target.server, "POST", "/v1/completions", body) as answer:
            async for part in answer.parts():
                now = self._now()
                for event in read_events(events, part):
                    usage = event.usage or usage
                    if not (new := event.num_tokens):
                        continue
                    if count:
                        record.gaps.add((now - last) / new, new)
                    else:
                        first = now
                        record.first(request.seconds, now, request.num_input)
                    record.tokens(now, new)
                    count, last = count + new, now
        if not events.done or count != request.num_output:
            problem = f"POST /v1/completions: {count} of {request.num_output} tokens came"
            raise ServerError("answer too short", problem)
        rate = (count - 1) / (last - first) if count > 1 and last > first else None
        record.finish(rate, usage.prompt_tokens, usage.cached)
