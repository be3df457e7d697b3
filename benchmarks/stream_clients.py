"""Clients of the frontend benchmark: they open streams and discard what comes."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import uvloop


def clients(port: int, model: str, streams: int, ready: Any, chunks: Any) -> None:
    """Opens the streams and discards their data, counting ``chunks`` if given. Sets ``ready`` when
    each stream has sent something.
    """
    body = msgspec.json.encode(
        {
            "model": model,
            "messages": [{"role": "user", "content": "Hello"}],
            "stream": True,
            "ignore_eos": True,
        }
    )
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % len(body)
    )

    async def one(started: asyncio.Semaphore) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head + body)
        status = await reader.readline()
        assert b" 200 " in status, status
        started.release()
        while data := await reader.read(65536):
            if chunks is not None:
                chunks.value += data.count(b"data: ")

    async def run() -> None:
        started = asyncio.Semaphore(0)
        tasks = [asyncio.create_task(one(started)) for _ in range(streams)]
        for _ in range(streams):
            await started.acquire()
        ready.set()
        await asyncio.gather(*tasks)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())
