"""A server under a benchmark: its model, and one timed request to it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..client.canary import server_version
from ..client.load import vocabulary_size
from ..client.server import Server, ServerError, ask, served_model
from ..client.traffic import EventReader, StreamUsage, read_events
from .timing import Failure, TimedRequest

Clock = Callable[[], float]
"""Seconds since the start of the round."""

_Told = TypeVar("_Told")


@dataclass(frozen=True)
class Endpoint:
    """``max_len``: longest prompt and answer together. It and ``vocab_size`` are None if the server
    does not report them.
    """

    server: Server
    model: str
    version: str
    max_len: int | None
    vocab_size: int | None

    @property
    def url(self) -> str:
        return self.server.url


async def find(server: Server, wanted: str | None) -> Endpoint:
    """Asks a server for its model. Raises ServerError."""
    entry = await served_model(server, wanted)
    version = await _if_told(server_version(server))
    vocab_size = await _if_told(vocabulary_size(server))
    length = entry.get("max_model_len")
    max_len = length if isinstance(length, int) else None
    return Endpoint(server, str(entry["id"]), version or "unknown", max_len, vocab_size)


async def _if_told(answer: Awaitable[_Told]) -> _Told | None:
    """The answer of an optional page; None if the server lacks it or answers something else."""
    try:
        return await answer
    except ServerError as error:
        if error.status in (404, 405, 501) or error.kind in ("not JSON", "no vocabulary"):
            return None
        raise


@dataclass(frozen=True)
class Question:
    """A prompt to be answered with ``output`` tokens. ``salt``: keeps pages of earlier runs out."""

    prompt: NDArray[np.int32]
    output: int
    salt: str

    def body(self, model: str) -> dict[str, Any]:
        return {
            "model": model,
            "prompt": self.prompt.tolist(),
            "max_tokens": self.output,
            "temperature": 0.0,
            "ignore_eos": True,
            "cache_salt": self.salt,
            "stream": True,
            "stream_options": {"include_usage": True},
        }


async def timed(endpoint: Endpoint, question: Question, due: float, clock: Clock) -> TimedRequest:
    """Sends a request and times its chunks. A failure is part of the result."""
    body = question.body(endpoint.model)
    chunks: list[float] = []
    events = EventReader()
    usage = StreamUsage()
    counted = 0
    sent = clock()
    try:
        async with ask(endpoint.server, "POST", "/v1/completions", body) as answer:
            async for part in answer.parts():
                now = clock()
                for event in read_events(events, part):
                    usage = event.usage or usage
                    if event.choices:
                        chunks.append(now)
                        counted += event.says_more
        if not chunks or not events.done:
            state = "ended before [DONE]" if chunks else "held no token"
            raise ServerError("answer cut short", f"{endpoint.url}: a stream {state}")
    except ServerError as error:
        failure = Failure(error, clock())
        return TimedRequest(due, sent, chunks, counted, failure=failure)
    told = usage.completion_tokens
    return TimedRequest(due, sent, chunks, counted if told is None else told, told is not None, usage.cached)
