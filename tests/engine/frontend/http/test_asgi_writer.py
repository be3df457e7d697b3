"""The ASGI writer and the stream on top of it, against readers that lag and connections that
break.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import MutableMapping
from typing import Any

import pytest

from lockstep.engine.frontend.api.errors import ApiError
from lockstep.engine.frontend.http.asgi_writer import AsgiWriter
from lockstep.engine.frontend.http.streams import chunk_stream
from lockstep.engine.frontend.metrics.metrics import Metrics
from lockstep.engine.frontend.open_requests import OpenRequests
from lockstep.engine.frontend.reply import Reply
from lockstep.engine.frontend.requests.prepared import Outline, PreparedRequest, Prompt
from lockstep.engine.frontend.requests.stops import StopRule
from lockstep.engine.protocol.message import Finish, Sampling
from lockstep.engine.text.tokenizer import Codec
from support.engine.frontend.scripted_controller import batch
from support.engine.text.tiny_tokenizer import tiny_tokenizer, write_model


class Reader:
    """An ASGI ``send`` that waits while ``open`` is clear, like a server whose buffer is full."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.open.set()
        self.bodies: list[bytes] = []
        self.ended = False

    async def send(self, message: MutableMapping[str, Any]) -> None:
        if not self.open.is_set():
            await self.open.wait()
        if message["type"] == "http.response.body":
            self.bodies.append(message["body"])
            self.ended = not message["more_body"]

    async def receive(self) -> MutableMapping[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError

    def chunks(self) -> list[Any]:
        lines = b"".join(self.bodies).decode().split("\n\n")
        return [json.loads(line.removeprefix("data: ")) for line in lines if line and line != "data: [DONE]"]


def test_a_write_goes_through_at_once_and_waits_only_when_the_reader_lags() -> None:
    async def run() -> None:
        reader, idle = Reader(), asyncio.Event()
        writer = AsgiWriter(reader.send, idle.set)
        writer.write(b"a", True)
        assert reader.bodies == [b"a"]
        assert not writer.busy
        reader.open.clear()
        writer.write(b"b", True)
        assert writer.busy
        assert reader.bodies == [b"a"]
        reader.open.set()
        await asyncio.wait_for(idle.wait(), 30)
        assert reader.bodies == [b"a", b"b"]
        assert not writer.busy

    asyncio.run(run())


def test_a_send_that_breaks_while_it_waits_leaves_the_writer_idle() -> None:
    async def run() -> None:
        idle = asyncio.Event()

        async def send(message: MutableMapping[str, Any]) -> None:
            await asyncio.sleep(0)
            await asyncio.sleep(0.001)
            raise ConnectionResetError

        writer = AsgiWriter(send, idle.set)
        writer.write(b"a", True)
        await asyncio.wait_for(idle.wait(), 30)
        assert not writer.busy

    asyncio.run(run())


@pytest.mark.parametrize("outcome", ["result", "exception", "cancelled"])
def test_a_send_that_waits_sees_how_its_future_ends(outcome: str) -> None:
    async def run() -> None:
        idle = asyncio.Event()
        loop = asyncio.get_running_loop()
        seen: list[object] = []

        async def send(message: MutableMapping[str, Any]) -> None:
            future: asyncio.Future[str] = loop.create_future()
            match outcome:
                case "result":
                    loop.call_later(0.001, future.set_result, "result")
                case "exception":
                    loop.call_later(0.001, future.set_exception, ValueError("exception"))
                case _:
                    loop.call_soon(future.cancel)
            try:
                seen.append(await future)
            except (ValueError, asyncio.CancelledError) as error:
                seen.append(str(error) or "cancelled")
            await asyncio.sleep(0.001)
            seen.append("end")

        writer = AsgiWriter(send, idle.set)
        writer.write(b"a", True)
        assert writer.busy
        await asyncio.wait_for(idle.wait(), 30)
        assert (writer.busy, seen) == (False, [outcome, "end"])

    asyncio.run(run())


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Codec:
    return Codec(write_model(tmp_path_factory.mktemp("model")))


class World:
    """A stream of one choice over a ``Reader``."""

    def __init__(self, codec: Codec, **outline: Any) -> None:
        self.reader = Reader()
        self.requests = OpenRequests("f", lambda message: None, Metrics("m"), lambda: ApiError(500, "ended"))
        request = PreparedRequest(
            outline=Outline("id", 1, "m", chat=True, **outline),
            prompts=[Prompt([1], b"", b"", 999)],
            samplings=[Sampling()],
            stop=StopRule(frozenset(), frozenset()),
        )
        self.reply = Reply(request, codec, self.requests)
        [self.generation] = self.reply.generations
        self.reply.submit()
        self._position = 0

    async def start(self) -> asyncio.Task[None]:
        task = asyncio.create_task(chunk_stream(self.reply)({}, self.reader.receive, self.reader.send))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return task

    def tokens(self, tokens: list[int], finish: Finish = Finish.NONE) -> None:
        self.requests.on_tokens(batch(1, [(self.generation.handle, self._position, tokens, finish)]))
        self._position += len(tokens)


def test_a_lagging_reader_gets_merged_deltas_and_the_same_text(codec: Codec) -> None:
    ids = tiny_tokenizer().encode("The quick brown fox jumps over the lazy dog.").ids

    async def run() -> None:
        world = World(codec, include_usage=True)
        world.tokens(ids[:1])
        task = await world.start()
        world.reader.open.clear()
        for token in ids[1:-1]:
            world.tokens([token])
        world.tokens(ids[-1:], Finish.STOP)
        assert not world.reader.ended
        world.reader.open.set()
        await asyncio.wait_for(task, 30)
        chunks = world.reader.chunks()
        texts = [choice["delta"]["content"] for chunk in chunks for choice in chunk["choices"]]
        assert "".join(texts) == "The quick brown fox jumps over the lazy dog."
        assert len(texts) == 4, "role, first token, the write that had to wait, all the rest"
        assert [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]] == [
            None,
            None,
            None,
            "stop",
        ]
        assert chunks[-1]["usage"]["completion_tokens"] == len(ids)
        assert b"".join(world.reader.bodies).endswith(b"data: [DONE]\n\n")
        assert world.reader.ended

    asyncio.run(run())


@pytest.mark.parametrize("lags", [False, True])
def test_an_error_in_mid_stream_is_a_frame_and_then_done(codec: Codec, lags: bool) -> None:
    async def run() -> None:
        world = World(codec)
        world.tokens([50])
        task = await world.start()
        if lags:
            world.reader.open.clear()
            world.tokens([51])
        world.requests.fail_all(ApiError(500, "the controller was lost"))
        world.reader.open.set()
        await asyncio.wait_for(task, 30)
        frames = b"".join(world.reader.bodies).split(b"\n\n")
        assert json.loads(frames[-3].removeprefix(b"data: "))["error"]["message"] == "the controller was lost"
        assert frames[-2] == b"data: [DONE]"
        assert world.reader.ended

    asyncio.run(run())


def test_stream_interval_never_delays_the_first_and_the_last_token(codec: Codec) -> None:
    ids = tiny_tokenizer().encode("The quick brown fox jumps over the lazy dog.").ids

    async def run() -> None:
        world = World(codec, interval=3)
        world.tokens(ids[:1])
        task = await world.start()
        for token in ids[1:-1]:
            world.tokens([token])
        world.tokens(ids[-1:], Finish.STOP)
        await asyncio.wait_for(task, 30)
        texts = [choice["delta"]["content"] for chunk in world.reader.chunks() for choice in chunk["choices"]]
        assert texts[1] == tiny_tokenizer().decode(ids[:1])
        assert len(texts) == 2 + -(-(len(ids) - 1) // 3)
        assert "".join(texts) == tiny_tokenizer().decode(ids)

    asyncio.run(run())


def test_a_connection_that_breaks_ends_the_stream_and_aborts(codec: Codec) -> None:
    async def run() -> None:
        world = World(codec)
        world.tokens([50])

        async def send(message: MutableMapping[str, Any]) -> None:
            if len(world.reader.bodies) == 1:
                raise ConnectionResetError
            await world.reader.send(message)

        task = asyncio.create_task(chunk_stream(world.reply)({}, world.reader.receive, send))
        async with asyncio.timeout(30):
            while not world.reader.bodies:
                await asyncio.sleep(0)
        world.tokens([51])
        world.tokens([52])
        await asyncio.wait_for(task, 30)
        assert (len(world.reader.bodies), world.generation.finish) == (1, "abort")

    asyncio.run(run())
