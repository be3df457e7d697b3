"""Writes to an ASGI ``send`` without a task per write.

A task that waits for the next token costs two wake-ups of the loop per token and stream. ``send``
of a server with room in its buffer returns without waiting, so its coroutine can be run where the
token arrives; only when it does wait (the reader lags) is it parked on the future it waits for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from typing import Any, cast

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Outlet:
    """``busy`` while the last write has not gone through; ``on_idle`` is called when it has, or has
    failed.
    """

    __slots__ = ("_loop", "_on_idle", "_send", "_step", "busy")

    def __init__(self, send: Send, on_idle: Callable[[], None]) -> None:
        self._send = cast(Callable[[MutableMapping[str, Any]], Coroutine[Any, None, None]], send)
        self._on_idle = on_idle
        self._loop = asyncio.get_running_loop()
        self._step: Coroutine[Any, None, None] | None = None
        self.busy = False

    def write(self, body: bytes, more: bool) -> None:
        """Sends a part of the body. Not allowed while busy. What ``send`` raises at once is raised
        here.
        """
        assert not self.busy, "write to a busy outlet"
        step = self._send({"type": "http.response.body", "body": body, "more_body": more})
        try:
            waits_for = step.send(None)
        except StopIteration:
            return
        self.busy = True
        self._step = step
        self._park(waits_for)

    def _park(self, waits_for: Any) -> None:
        if waits_for is None:  # a bare yield: goes on in the next turn of the loop
            self._loop.call_soon(self._resume)
            return
        waits_for._asyncio_future_blocking = (
            False  # what a Task does to say that the future was awaited properly
        )
        waits_for.add_done_callback(self._resume)

    def _resume(self, _: object = None) -> None:
        assert self._step is not None
        try:
            waits_for = self._step.send(None)
        except StopIteration:
            self._idle()
        except Exception:  # the connection broke; the watcher of the request sees it too
            self._idle()
        else:
            self._park(waits_for)

    def _idle(self) -> None:
        self.busy = False
        self._step = None
        self._on_idle()
