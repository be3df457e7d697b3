"""The requests of a trace as bodies for a server: tokens, with shared prefixes."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from ...kernels.splitmix import mix64
from ..simulation.trace import Trace
from .server import ServerError


def prompt_ids(trace: Trace, number: int, vocab_size: int) -> list[int]:
    """Random tokens of the length asked; equal where the trace names equal blocks."""
    words = np.frombuffer(trace.prompt(number), np.int32).astype(np.uint64)
    ids: list[int] = (mix64(words) % np.uint64(vocab_size)).astype(np.int64).tolist()
    return ids


def request_body(trace: Trace, number: int, model: str, vocab_size: int) -> dict[str, Any]:
    """A completion of exactly the length asked, streamed with the ids of its tokens."""
    return {
        "model": model,
        "prompt": prompt_ids(trace, number, vocab_size),
        "max_tokens": trace.requests[number].num_output,
        "ignore_eos": True,
        "seed": number,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }


class _Details(msgspec.Struct):
    cached_tokens: int | None = 0


class StreamUsage(msgspec.Struct):
    """The usage at the end of a stream."""

    prompt_tokens: int = 0
    completion_tokens: int | None = None
    prompt_tokens_details: _Details | None = None

    @property
    def cached(self) -> int:
        return (self.prompt_tokens_details.cached_tokens or 0) if self.prompt_tokens_details else 0


class _Choice(msgspec.Struct):
    text: str | None = None
    token_ids: list[int] | None = None
    finish_reason: str | None = None


class StreamEvent(msgspec.Struct):
    """An event of a streamed completion. ``error``: the stream ends with it."""

    choices: list[_Choice] = []
    usage: StreamUsage | None = None
    error: dict[str, Any] | None = None

    @property
    def num_tokens(self) -> int:
        return sum(len(choice.token_ids or ()) for choice in self.choices)

    @property
    def says_more(self) -> bool:
        """Whether it has content or a usage, not only an end mark. Its text may be empty: tokens of
        an incomplete character.
        """
        return any(choice.text or choice.token_ids or not choice.finish_reason for choice in self.choices)


class EventReader:
    """Cuts a stream of server-sent events, in pieces of any size, into its events."""

    def __init__(self) -> None:
        self._rest = b""
        self._decoder = msgspec.json.Decoder(StreamEvent)
        self.done = False

    def feed(self, part: bytes) -> list[StreamEvent]:
        """The events that end in this part. Raises msgspec.DecodeError."""
        *lines, self._rest = (self._rest + part).split(b"\n")
        found = []
        for line in lines:
            data = line.removeprefix(b"data:").strip() if line.startswith(b"data:") else b""
            if data == b"[DONE]":
                self.done = True
            elif data:
                found.append(self._decoder.decode(data))
        return found


def read_events(reader: EventReader, part: bytes) -> list[StreamEvent]:
    """The events that end in this part. Raises ServerError for other text, and for an error."""
    try:
        events = reader.feed(part)
    except msgspec.DecodeError as error:
        raise ServerError("not an event", f"a stream holds no event: {error}") from None
    for event in events:
        if event.error is not None:
            raise ServerError("error in a stream", str(event.error.get("message", event.error)))
    return events
