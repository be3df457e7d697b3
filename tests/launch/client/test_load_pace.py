"""``Load`` against a server of this process: open-loop, bounded, and unmoved by silent streams."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable

from lockstep.launch.client.load import Load, Target
from lockstep.launch.client.load_record import LoadReport
from lockstep.launch.client.server import server_at
from lockstep.launch.simulation.trace import Trace, TraceRequest

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
Act = Callable[[asyncio.StreamWriter, int], Awaitable[None]]


def chunk(text: str) -> bytes:
    data = f"data: {text}\n\n".encode()
    return b"%x\r\n%s\r\n" % (len(data), data)


def tokens(*ids: int) -> bytes:
    return chunk(json.dumps({"choices": [{"token_ids": ids}]}))


END = chunk("[DONE]") + b"0\r\n\r\n"


class Scripted:
    """A server whose answers ``act`` writes. ``peak``: most requests that were open at once."""

    def __init__(self, act: Act) -> None:
        self._act = act
        self.asked = self.open = self.peak = 0
        self.arrived = asyncio.Condition()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.asked += 1
        number, self.open = self.asked, self.open + 1
        self.peak = max(self.peak, self.open)
        async with self.arrived:
            self.arrived.notify_all()
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length"))
            await reader.readexactly(int(length.split(b":")[1]))
            await self._act(writer, number)
        finally:
            self.open -= 1
            writer.close()


def replay(
    act: Act, requests: list[TraceRequest], most: int, seconds: float = 30.0
) -> tuple[LoadReport, Scripted]:
    async def run() -> tuple[LoadReport, Scripted]:
        scripted = Scripted(act)
        server = await asyncio.start_server(scripted.answer, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            target = Target(server_at(f"http://127.0.0.1:{port}", seconds), "demo", 100)
            load = Load(target, Trace("made", tuple(requests)), most)
            complete = await load.run(asyncio.Event(), lambda record, seconds: None)
        assert complete
        return load.record.report(complete=complete), scripted

    async def in_time() -> tuple[LoadReport, Scripted]:
        async with asyncio.timeout(60.0):
            return await run()

    return asyncio.run(in_time())


async def two_tokens(writer: asyncio.StreamWriter, number: int) -> None:
    writer.write(HEAD + tokens(1))
    await asyncio.sleep(0.01)
    writer.write(tokens(2) + END)
    await writer.drain()


def test_no_more_than_so_many_requests_are_open() -> None:
    report, scripted = replay(two_tokens, [TraceRequest(0.0, 8, 2)] * 20, 4)
    assert (report.finished, report.failed, scripted.asked) == (20, 0, 20)
    assert scripted.peak == 4
    assert report.lateness.p99 is not None and report.lateness.p99 >= 4 * 0.01


def test_requests_leave_when_due_though_none_is_answered() -> None:
    """The server answers the first when the last has come."""
    everyone = asyncio.Event()

    async def wait_for_all(writer: asyncio.StreamWriter, number: int) -> None:
        if number == 10:
            everyone.set()
        await everyone.wait()
        await two_tokens(writer, number)

    report, scripted = replay(wait_for_all, [TraceRequest(0.01 * n, 8, 2) for n in range(10)], 100)
    assert (report.finished, scripted.peak) == (10, 10)


def test_each_way_to_fail_has_a_kind() -> None:
    async def fail(writer: asyncio.StreamWriter, number: int) -> None:
        error = chunk(json.dumps({"error": {"message": "the cluster is lost", "code": 500}}))
        busy = b"HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\nfull"
        writer.write(
            {
                1: HEAD + tokens(1, 2) + END,
                2: busy,
                3: HEAD + tokens(1) + error + END,
                4: HEAD + tokens(1) + END,
                5: HEAD + tokens(1),
                6: HEAD + chunk("{") + END,
                7: b"",
            }[number]
        )
        await writer.drain()
        if number == 7:
            await asyncio.sleep(30.0)

    report, _ = replay(fail, [TraceRequest(0.05 * n, 8, 2) for n in range(7)], 1, seconds=2.0)
    assert report.finished == 1
    assert report.errors == dict.fromkeys(
        ("HTTP 503", "error in a stream", "answer too short", "cut off", "not an event", "silent"), 1
    )
    assert report.open == 0
    assert report.sent == 7


def test_tokens_that_come_together_share_their_time() -> None:
    async def merged(writer: asyncio.StreamWriter, number: int) -> None:
        writer.write(HEAD + tokens(1))
        await writer.drain()
        await asyncio.sleep(0.2)
        writer.write(tokens(2, 3, 4, 5) + END)
        await writer.drain()

    report, _ = replay(merged, [TraceRequest(0.0, 8, 5)], 1)
    assert report.output_tokens == 5
    assert report.time_between_tokens.p50 is not None
    assert 0.04 < report.time_between_tokens.p50 == report.time_between_tokens.p99
