"""Several frontends behind one port: evenly used, and each answers for all of them."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from lockstep.engine.frontend.connections import connect
from lockstep.engine.protocol.specs import AcceptorSpec
from support.engine.frontend.running_frontend import RunningFrontend, wait_until
from support.engine.frontend.scripted_controller import Item, say
from support.engine.text.tiny_tokenizer import IM_END, tiny_tokenizer, write_model

USER = [{"role": "user", "content": "Hello"}]
WORDS = tiny_tokenizer().encode("The quick brown fox").ids
ADMIN = {"Authorization": "Bearer master"}
KEY = {"Authorization": "Bearer sesame"}


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[RunningFrontend]:
    model = write_model(tmp_path / "model")
    with RunningFrontend(
        model, say([*WORDS, IM_END]), processes=2, api_keys=("sesame",), admin_key="master"
    ) as running:
        yield running


@pytest.fixture
def clients(pair: RunningFrontend) -> Iterator[list[httpx.Client]]:
    """A client of each frontend: connections are dealt in turn."""
    with ExitStack() as stack:
        opened = [stack.enter_context(httpx.Client(base_url=pair.url, timeout=20)) for _ in range(2)]
        for client in opened:
            client.get("/version")
        yield opened


def values(client: httpx.Client) -> dict[str, float]:
    lines = [line for line in client.get("/metrics").text.splitlines() if line and not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def answers(client: httpx.Client, path: str, status: int) -> bool:
    return client.get(path).status_code == status


def chat(client: httpx.Client, **fields: Any) -> httpx.Response:
    return client.post("/v1/chat/completions", json={"messages": USER, **fields}, headers=KEY)


def test_one_scrape_of_either_is_the_sum_of_both(pair: RunningFrontend, clients: list[httpx.Client]) -> None:
    first, second = clients
    for client, count in ((first, 3), (second, 2)):
        for _ in range(count):
            assert chat(client).status_code == 200
    assert {submit.request_id.rpartition("-")[0] for submit in pair.engine.submits} == {
        "frontend-0",
        "frontend-1",
    }
    assert len({submit.request_id for submit in pair.engine.submits}) == 5
    label = '{engine="0",model_name="tiny"}'
    stops = 'vllm:request_success_total{engine="0",finished_reason="stop",model_name="tiny"}'
    routes = 'http_requests_total{handler="/v1/chat/completions",method="POST",status="2xx"}'
    for client in (first, second):
        seen: dict[str, float] = {}

        def both_are_seen(client: httpx.Client = client, seen: dict[str, float] = seen) -> bool:
            seen.update(values(client))
            return seen[stops] == seen[routes] == 5  # a request ends before its answer has left

        wait_until(both_are_seen, "the counts of both to be seen")
        assert seen[f"vllm:time_to_first_token_seconds_count{label}"] == 5
        assert seen[f"vllm:inter_token_latency_seconds_count{label}"] == 5 * len(WORDS), (
            "gaps of the words and of the end"
        )
        assert seen[f"vllm:request_generation_tokens_sum{label}"] == 5 * (len(WORDS) + 1)
        assert not any("frontend" in name or "pid" in name for name in seen), "a label of a process"


def test_scrapes_in_turn_never_count_backwards(pair: RunningFrontend, clients: list[httpx.Client]) -> None:
    stops = 'vllm:request_success_total{engine="0",finished_reason="stop",model_name="tiny"}'
    tokens = 'vllm:generation_tokens_total{engine="0",model_name="tiny"}'
    last = (0.0, 0.0)
    for turn in range(20):
        pair.engine.set_state(number=turn + 1, generation_tokens=100 * turn)
        assert chat(clients[turn % 2]).status_code == 200
        for client in clients:
            now = values(client)
            assert (now[stops], now[tokens]) >= last
            assert now[tokens] >= last[1] and now[stops] >= last[0]
            last = now[stops], now[tokens]
    assert last[0] == 20 and last[1] >= 1800


CHILD = """
import sys, msgspec
from lockstep.engine.frontend.process import main
from lockstep.engine.protocol.specs import FrontendSpec
main(msgspec.json.decode(sys.argv[1], type=FrontendSpec))
"""


def test_a_restarted_frontend_goes_on_from_the_counts_before(tmp_path: Path) -> None:
    idle = RunningFrontend(
        write_model(tmp_path / "model"), say([*WORDS, IM_END])
    )  # not entered: its frontend is a process of its own
    command = [sys.executable, "-c", CHILD, msgspec.json.encode(idle.spec).decode()]
    stops = 'vllm:request_success_total{engine="0",finished_reason="stop",model_name="tiny"}'
    try:
        for life in range(1, 4):
            child = subprocess.Popen(command)
            try:
                # The first request waits in the queue of the port meanwhile.
                with httpx.Client(base_url=idle.url, timeout=60) as http:
                    wait_until(partial(answers, http, "/health", 200), "it serves")
                    assert http.post("/v1/chat/completions", json={"messages": USER}).status_code == 200
                    assert values(http)[stops] == life
            finally:
                child.kill()
                child.wait()
        assert {hello.name for hello in idle.engine.hellos} == {"frontend-0"}
        assert len({hello.life for hello in idle.engine.hellos}) == 3
    finally:
        idle.close()


def test_load_counts_the_open_requests_of_both(pair: RunningFrontend, clients: list[httpx.Client]) -> None:
    def one_token_and_no_end(submit: object) -> Iterator[Item]:
        yield [WORDS[0]]
        while True:
            yield None

    pair.engine.script = one_token_and_no_end
    with ExitStack() as streams:
        for client, count in zip(clients, (1, 1), strict=True):
            for _ in range(count):
                body = {"messages": USER, "stream": True, "ignore_eos": True}
                streams.enter_context(client.stream("POST", "/v1/chat/completions", json=body, headers=KEY))
        with ExitStack() as askers:
            for _ in range(2):
                asker = askers.enter_context(httpx.Client(base_url=pair.url, timeout=20))
                wait_until(
                    lambda asker=asker: asker.get("/load").json()["server_load"] == 2, "the load of both"
                )  # type: ignore[misc]


@pytest.mark.parametrize("who", [0, 1])
def test_draining_one_drains_all(pair: RunningFrontend, clients: list[httpx.Client], who: int) -> None:
    assert clients[who].post("/admin/drain", headers=KEY).status_code == 401
    assert clients[who].post("/admin/drain", json={"deadline": 7}, headers=ADMIN).status_code == 202
    wait_until(lambda: [drain.deadline for drain in pair.engine.drains] == [7], "the controller is told")
    pair.engine.set_state(phase="draining")  # as a real one does, which a test of the controller holds
    for client in clients:
        wait_until(partial(answers, client, "/ready", 503), "not ready")
        assert client.get("/health").status_code == 200
        assert chat(client).status_code == 503


def test_keys_hold_on_all(clients: list[httpx.Client]) -> None:
    for client in clients:
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            for method, path in (
                ("GET", "/v1/models"),
                ("POST", "/v1/chat/completions"),
                ("GET", "/admin/cluster"),
            ):
                answer = client.request(method, path, headers=headers)
                assert answer.status_code == 401
                assert (
                    set(answer.json()["error"]) == {"message", "type", "param", "code"}
                    and answer.json()["error"]["code"] == 401
                )
        assert client.get("/v1/models", headers=KEY).status_code == 200
        assert client.get("/admin/cluster", headers=ADMIN).status_code == 200


def test_64_connections_are_32_each(pair: RunningFrontend) -> None:
    def endless(submit: object) -> Iterator[Item]:
        while True:
            yield None

    pair.engine.script = endless
    pair.engine.step_seconds = 0.05
    body = msgspec.json.encode({"messages": USER, "stream": True, "ignore_eos": True})
    threads = [threading.Thread(target=_ask, args=(pair.url, body), daemon=True) for _ in range(64)]
    try:
        for thread in threads:
            thread.start()
        wait_until(lambda: len(pair.engine.submits) == 64, "64 requests", 60)
        names = [submit.request_id.rpartition("-")[0] for submit in pair.engine.submits]
        assert names.count("frontend-0") == names.count("frontend-1") == 32
    finally:
        pair.engine.stop()
        for thread in threads:
            thread.join(30)
    assert not any(thread.is_alive() for thread in threads), "streams that nobody ended"


def _ask(url: str, body: bytes) -> None:
    with httpx.Client(base_url=url, timeout=60) as http, suppress(httpx.HTTPError):
        http.post("/v1/chat/completions", content=body, headers=KEY)


def test_without_a_launcher_it_does_not_start() -> None:
    with pytest.raises(ConnectionError, match=r"the launcher's acceptor cannot be reached: .*refused"):
        connect(AcceptorSpec(address="nobody-is-here", token="x"), 0)
