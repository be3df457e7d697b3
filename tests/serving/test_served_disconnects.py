"""Clients that go away: their rows and pages are free soon, long before their requests would have
ended, and other clients notice nothing.
"""

from __future__ import annotations

import asyncio
import random
import socket

import httpx

from support.serving.mixed_asks import Known, Oracle, random_bodies, random_prompt
from support.serving.served import Answer, Ask, Body, Served, send

NUM_CUT, NUM_KEPT, NUM_TOKENS, NUM_ENDLESS = 200, 8, 300, 3000


class Crowd:
    """``NUM_CUT`` endless streams and ``NUM_KEPT`` others; the endless ones are cut at once when
    all of them have tokens.
    """

    def __init__(self, served: Served, endless: list[Body], kept: list[Ask]) -> None:
        self._served, self._endless, self._kept = served, endless, kept
        self.kept: list[Answer] = []
        self.chunks = 0
        self.tokens_to_free = 0.0  # that the server made from the cut until all was free

    async def run(self) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(base_url=self._served.base, timeout=60.0, limits=limits) as http:
            kept = [asyncio.create_task(send(http, ask)) for ask in self._kept]
            streaming, gate = asyncio.Semaphore(0), asyncio.Event()
            cut = [asyncio.create_task(self._cut(http, body, streaming, gate)) for body in self._endless]
            async with asyncio.timeout(60.0):
                for _ in cut:
                    await streaming.acquire()
            await asyncio.to_thread(
                self._served.wait_until, self._all_seen, "the state of the cluster shows them all"
            )
            generated = await asyncio.to_thread(self._generated)
            gate.set()
            await asyncio.gather(*cut)
            await asyncio.to_thread(
                self._served.wait_until, self._all_free, "only what the kept streams may hold is held"
            )
            self.tokens_to_free = await asyncio.to_thread(self._generated) - generated
            assert not any(task.done() for task in kept), "the others were to outlast the cut ones"
            self.kept = list(await asyncio.gather(*kept))

    async def _cut(
        self, http: httpx.AsyncClient, body: Body, streaming: asyncio.Semaphore, gate: asyncio.Event
    ) -> None:
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

    def _all_free(self) -> bool:
        most_pages = sum((len(ask.body["prompt"]) + NUM_TOKENS) // 16 + 2 for ask in self._kept)
        cluster, load = self._served.cluster(), _load(self._served)
        pages = sum(rank["pages_used"] for rank in cluster["ranks"])
        return (
            max(load, cluster["num_running"]) <= len(self._kept)
            and pages <= most_pages
            and not cluster["num_waiting"]
        )

    def _generated(self) -> float:
        return self._served.metrics()["generation_tokens_total"]


def test_two_hundred_streams_cut_in_the_middle(demo: Served, oracle: Oracle) -> None:
    dice = random.Random(21)
    known = oracle.know(demo, random_bodies(dice, NUM_KEPT, (5, 40)), NUM_TOKENS)
    endless: list[Body] = [
        {
            "prompt": random_prompt(dice, 5, 60),
            "max_tokens": NUM_ENDLESS,
            "ignore_eos": True,
            "stream": True,
            "temperature": 1.0,
        }
        for _ in range(NUM_CUT)
    ]
    asks = [
        known[index % len(known)].ask(NUM_TOKENS, cache_salt=f"kept {index}", stream=index % 2 == 0)
        for index in range(NUM_KEPT)
    ]
    crowd = Crowd(demo, endless, asks)
    asyncio.run(crowd.run())
    assert crowd.chunks > 2 * NUM_CUT
    assert crowd.tokens_to_free < NUM_CUT * NUM_ENDLESS / 10, "long before they would have ended"
    for index, answer in enumerate(crowd.kept):
        assert len(answer.tokens) == NUM_TOKENS
        known[index % len(known)].assert_same(answer, "beside streams that were cut")
    demo.assert_clean()


def test_clients_that_leave_while_they_wait_for_a_whole_answer(demo: Served) -> None:
    """Not streamed: the server sees nothing but the end of the connection, some of them before a
    row was free.
    """
    aborted = _aborted(demo)
    asks = [
        Ask({"prompt": [5, 9, 11 + index], "max_tokens": NUM_ENDLESS, "ignore_eos": True})
        for index in range(300)
    ]
    asyncio.run(_ask_and_leave(demo, asks))
    demo.assert_clean()
    demo.wait_until(lambda: _aborted(demo) >= aborted + len(asks), "all are counted as aborted")


async def _ask_and_leave(served: Served, asks: list[Ask]) -> None:
    """Goes away when the server has all of them: it never hears of a request that was still on its
    way.
    """
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=served.base, timeout=60.0, limits=limits) as http:
        waiting = [asyncio.create_task(send(http, ask)) for ask in asks]
        await asyncio.to_thread(
            served.wait_until, lambda: _load(served) >= len(asks), "the server has all requests"
        )
        assert not any(task.done() for task in waiting)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


def test_clients_that_leave_before_their_request_is_complete(demo: Served) -> None:
    host, port = demo.base.removeprefix("http://").split(":")
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
    head += b"Content-Type: application/json\r\nContent-Length: 5000\r\n\r\n"
    for sent in (head, head + b'{"prompt": "', head[:40], b""):
        for _ in range(25):
            with socket.create_connection((host, int(port)), timeout=60.0) as raw:
                raw.sendall(sent)
    demo.assert_clean()


def test_random_cuts_leave_the_others_whole(demo: Served, oracle: Oracle) -> None:
    dice = random.Random(22)
    known = oracle.know(demo, random_bodies(dice, 12, (5, 40)), 40)

    def ask(each: Known, index: int) -> Ask:
        return each.ask(
            40, cut_after=dice.randint(1, 30) if index % 2 else None, stream=True, n=1 + index % 3
        )

    chosen = [known[index % len(known)] for index in range(100)]
    answers = demo.ok([ask(each, index) for index, each in enumerate(chosen)])
    for each, answer in zip(chosen, answers, strict=True):
        each.assert_same(answer, "among streams that were cut")
        assert answer.cut or (answer.done and len(answer.tokens) == 40)
    assert sum(answer.cut for answer in answers) >= 40
    demo.assert_clean()


def _load(served: Served) -> int:
    return int(served.http.get("/load").json()["server_load"])


def _aborted(served: Served) -> float:
    return served.metrics()['request_success_total{engine="0",finished_reason="abort",model_name="demo"}']
