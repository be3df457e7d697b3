"""Clients that go away: what they held is free soon, long before it would have been used up, and nobody else notices."""

from __future__ import annotations

import asyncio
import random
import socket
import time

import httpx
import pytest

from support.mixed_asks import Known, Oracle, random_bodies, random_prompt
from support.serving import Answer, Ask, Body, Served, send

pytestmark = pytest.mark.timeout(120)
NUM_CUT, NUM_KEPT, NUM_TOKENS = 200, 8, 300
SECONDS = 5.0


class Crowd:
    """``NUM_CUT`` endless streams and ``NUM_KEPT`` others; the endless ones are cut at once when all of them have tokens."""

    def __init__(self, served: Served, endless: list[Body], kept: list[Ask]) -> None:
        self._served, self._endless, self._kept = served, endless, kept
        self.kept: list[Answer] = []
        self.chunks = 0
        self.seconds_to_free = 0.0

    async def run(self) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(base_url=self._served.base, timeout=60.0, limits=limits) as http:
            kept = [asyncio.create_task(send(http, ask)) for ask in self._kept]
            streaming, gate = asyncio.Semaphore(0), asyncio.Event()
            cut = [asyncio.create_task(self._cut(http, body, streaming, gate)) for body in self._endless]
            async with asyncio.timeout(60.0):
                for _ in cut:
                    await streaming.acquire()
            await asyncio.to_thread(self._served.wait_until, self._all_seen, "the state of the cluster shows them all")
            gate.set()
            await asyncio.gather(*cut)
            await self._freed(http)
            assert not any(task.done() for task in kept), "the others were to outlast the cut ones"
            self.kept = list(await asyncio.gather(*kept))

    async def _cut(self, http: httpx.AsyncClient, body: Body, streaming: asyncio.Semaphore, gate: asyncio.Event) -> None:
        async with http.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200
            num_lines = 0
            async for _ in response.aiter_lines():
                num_lines += 1
                if num_lines == 1:
                    streaming.release()
                if gate.is_set():
                    break
            self.chunks += num_lines // 2  # an empty line follows each

    def _all_seen(self) -> bool:
        return bool(self._served.cluster()["num_running"] == len(self._endless) + len(self._kept))

    async def _freed(self, http: httpx.AsyncClient) -> None:
        """Polls until only what the kept streams may hold is held."""
        began = time.monotonic()
        most_pages = sum((len(ask.body["prompt"]) + NUM_TOKENS) // 16 + 2 for ask in self._kept)
        while True:
            await asyncio.sleep(0.02)
            cluster = await asyncio.to_thread(self._served.cluster)
            load = (await http.get("/load")).json()["server_load"]
            pages = sum(rank["pages_used"] for rank in cluster["ranks"])
            self.seconds_to_free = time.monotonic() - began
            if max(load, cluster["num_running"]) <= len(self._kept) and pages <= most_pages and not cluster["num_waiting"]:
                return
            held = f"{load} requests, {cluster['num_running']} running, {cluster['num_waiting']} waiting, {pages} pages"
            assert self.seconds_to_free < SECONDS, f"{SECONDS} s after the cut: {held}"


def test_two_hundred_streams_cut_in_the_middle(demo: Served, oracle: Oracle) -> None:
    dice = random.Random(21)
    known = oracle.know(demo, random_bodies(dice, NUM_KEPT, (5, 40)), NUM_TOKENS)
    endless: list[Body] = [
        {"prompt": random_prompt(dice, 5, 60), "max_tokens": 3000, "ignore_eos": True, "stream": True, "temperature": 1.0}
        for _ in range(NUM_CUT)
    ]
    asks = [known[index % len(known)].ask(NUM_TOKENS, cache_salt=f"kept {index}", stream=index % 2 == 0) for index in range(NUM_KEPT)]
    crowd = Crowd(demo, endless, asks)
    asyncio.run(crowd.run())
    assert crowd.chunks > 2 * NUM_CUT
    for index, answer in enumerate(crowd.kept):
        assert len(answer.tokens) == NUM_TOKENS
        known[index % len(known)].assert_same(answer, "beside streams that were cut")
    demo.assert_clean()


def test_clients_that_leave_while_they_wait_for_a_whole_answer(demo: Served) -> None:
    """Not streamed: the server sees nothing but the end of the connection, some of them before a row was free."""
    aborted = _aborted(demo)
    with pytest.raises(TimeoutError):
        demo.together([Ask({"prompt": [5, 9, 11 + index], "max_tokens": 3000, "ignore_eos": True}) for index in range(300)], seconds=1.5)
    demo.assert_clean()
    assert _aborted(demo) >= aborted + 300


def test_clients_that_leave_before_their_request_is_complete(demo: Served) -> None:
    host, port = demo.base.removeprefix("http://").split(":")
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 5000\r\n\r\n"
    for sent in (head, head + b'{"prompt": "', head[:40], b""):
        for _ in range(25):
            with socket.create_connection((host, int(port)), timeout=5.0) as raw:
                raw.sendall(sent)
    demo.assert_clean()


def test_random_cuts_leave_the_others_whole(demo: Served, oracle: Oracle) -> None:
    dice = random.Random(22)
    known = oracle.know(demo, random_bodies(dice, 12, (5, 40)), 40)

    def ask(each: Known, index: int) -> Ask:
        return each.ask(40, cut_after=dice.randint(1, 30) if index % 2 else None, stream=True, n=1 + index % 3)

    chosen = [known[index % len(known)] for index in range(100)]
    answers = demo.ok([ask(each, index) for index, each in enumerate(chosen)])
    for each, answer in zip(chosen, answers, strict=True):
        each.assert_same(answer, "among streams that were cut")
        assert answer.cut or (answer.done and len(answer.tokens) == 40)
    assert sum(answer.cut for answer in answers) >= 40
    demo.assert_clean()


def _aborted(served: Served) -> float:
    return served.metrics()['request_success_total{engine="0",finished_reason="abort",model_name="demo"}']
