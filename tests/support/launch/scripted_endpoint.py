"""A double of an OpenAI endpoint on a real socket, in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

_HEAD = b"HTTP/1.1 %d Said\r\nTransfer-Encoding: chunked\r\nContent-Type: application/json\r\n\r\n"


@dataclass
class ScriptedEndpoint:
    """``key``: asked of every request but /version. ``vocab``, ``max_len``: None is not told.
    ``refusals``: statuses of completions by their number, from 1. ``together``: so many streams
    begin at once. ``dies_at``: the completion in whose middle all connections end, and all later
    ones as soon as they are made. ``bodies``: of the completions asked; ``peak``: most of them at
    once.
    """

    key: str | None = None
    vocab: int | None = 100
    max_len: int | None = 4096
    usage: bool = True
    refusals: dict[int, int] = field(default_factory=dict)
    together: int = 1
    dies_at: int | None = None
    bodies: list[dict[str, Any]] = field(default_factory=list)
    peak: int = 0
    url: str = ""
    _open: int = 0
    _dead: bool = False

    async def serve(self, started: threading.Event, stop: asyncio.Event) -> None:
        self._barrier = asyncio.Barrier(self.together)
        self._writers: set[asyncio.StreamWriter] = set()
        self._server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        started.set()
        async with self._server:
            await stop.wait()
            for _ in range(5):  # asyncio leaks connections that it accepts while a server closes
                await asyncio.sleep(0)
        while others := asyncio.all_tasks() - {asyncio.current_task()}:  # connections, accepted or answered
            for writer in self._writers:
                writer.transport.abort()
            await asyncio.wait(others, timeout=0.01)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        if self._dead:
            writer.transport.abort()
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            fields = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if line)
            body = await reader.readexactly(int(fields["content-length"]))
            path = head.split()[1]
            if path != "/version" and self.key and fields.get("authorization") != f"bearer {self.key}":
                self._say(writer, 401, {"error": {"message": "wrong key"}})
            elif path == "/v1/completions":
                await self._complete(writer, json.loads(body))
            else:
                self._say(writer, *self._page(path))
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError):  # the client has gone
            pass
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
            self._writers.discard(writer)

    def _page(self, path: str) -> tuple[int, Any]:
        if path == "/v1/models":
            return 200, {"data": [{"id": "scripted", "max_model_len": self.max_len}]}
        if path == "/tokenizer_info" and self.vocab is not None:
            return 200, {"vocab_size": self.vocab}
        return 404, {"error": {"message": "no such page"}}

    def _say(self, writer: asyncio.StreamWriter, status: int, document: Any) -> None:
        writer.write(_HEAD % status + _part(json.dumps(document)) + b"0\r\n\r\n")

    async def _complete(self, writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        self.bodies.append(body)
        number = len(self.bodies)
        self._open += 1
        self.peak = max(self.peak, self._open)
        try:
            await self._barrier.wait()
            if number in self.refusals:
                self._say(writer, self.refusals[number], {"error": {"message": f"refused {number}"}})
                return
            writer.write(_HEAD % 200)
            for token in range(body["max_tokens"]):
                if self.dies_at == number and token == 1:
                    self._dead = True
                    for each in self._writers:
                        each.transport.abort()
                    return
                writer.write(_event({"choices": [{"text": "a", "finish_reason": None}]}))
                await writer.drain()
            writer.write(_event({"choices": [{"text": "", "finish_reason": "length"}]}))
            if self.usage:
                usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
                writer.write(_event({"choices": [], "usage": usage}))
            writer.write(_part("data: [DONE]\n\n") + b"0\r\n\r\n")
        finally:
            self._open -= 1


def _part(text: str) -> bytes:
    data = text.encode()
    return b"%x\r\n%s\r\n" % (len(data), data)


def _event(document: Any) -> bytes:
    return _part(f"data: {json.dumps(document)}\n\n")


@contextmanager
def scripted_endpoint(**settings: Any) -> Iterator[ScriptedEndpoint]:
    """A served double; see ``ScriptedEndpoint`` for its settings."""
    endpoint, started = ScriptedEndpoint(**settings), threading.Event()
    handles: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def main() -> None:
        stop = asyncio.Event()
        handles.append((asyncio.get_running_loop(), stop))
        await endpoint.serve(started, stop)

    thread = threading.Thread(target=asyncio.run, args=(main(),), daemon=True)
    thread.start()
    assert started.wait(30.0), "the double did not start within 30 s"
    try:
        yield endpoint
    finally:
        [(loop, stop)] = handles
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(stop.set)
        thread.join(30.0)
        assert not thread.is_alive(), "the double did not end within 30 s"
