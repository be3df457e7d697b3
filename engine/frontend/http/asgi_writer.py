"""Writes to an ASGI ``send`` without a task per write.

A task that waits for the next token would cost two wake-ups of the loop per token and stream. The
``send`` of a server with room in its buffer returns without waiting, so its coroutine is run by
hand as the token arrives. Only a ``send`` that does wait, because the reader lags, gets a task.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine, Generator, MutableMapping
from typing import Any, cast

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class AsgiWriter:
    """Writes body parts. ``busy`` until the last write has gone through or failed; then ``on_idle``
    is called, unless that was at once.
    """

    __slots__ = ("_loop", "_on_idle", "_send", "_task", "busy")

    def __init__(self, send: Send, on_idle: Callable[[], None]) -> None:
        self._send = cast(Callable[[MutableMapping[str, Any]], Coroutine[Any, None, None]], send)
        self._on_idle = on_idle
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[None] | None = None  # a waiting send, kept alive here: the loop does not
        self.busy = False

    def write(self, body: bytes, more: bool) -> None:
        """Sends a part of the body. Not allowed while busy. Passes on exceptions that ``send``
        raises at once.
        """
        assert not self.busy, "write to a busy writer"
        sending = self._send({"type": "http.response.body", "body": body, "more_body": more})
        try:
            awaited = sending.send(None)
        except StopIteration:
            return
        self.busy = True
        self._task = self._loop.create_task(self._finish(_Started(sending, awaited)))

    async def _finish(self, sending: _Started) -> None:
        with contextlib.suppress(Exception):  # the watcher of the request sees a broken connection too
            await sending
        self.busy = False
        self._task = None
        self._on_idle()


class _Started(Generator[Any, None, None]):
    """A coroutine that was run up to its first wait; a task that awaits this waits there and goes
    on.

    ``awaited`` is the future that the coroutine has yielded, None for a turn of the loop.
    """

    __slots__ = ("_awaited", "_coroutine", "_waits")

    def __init__(self, coroutine: Coroutine[Any, None, None], awaited: Any) -> None:
        self._coroutine = coroutine
        self._awaited = awaited
        self._waits = False

    def __await__(self) -> Generator[Any, None, None]:
        return self

    def send(self, value: None) -> Any:
        if self._waits:
            return self._coroutine.send(value)
        self._waits = True
        return self._awaited

    def throw(self, *error: Any) -> Any:
        return self._coroutine.throw(*error)
