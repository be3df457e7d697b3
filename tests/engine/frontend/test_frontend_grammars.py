"""Schemas that take for ever, against a real frontend: others go on, and nothing is left behind."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from lockstep.engine.frontend.grammars.desk import PLACES, GrammarDesk
from support.engine.frontend.running_frontend import RunningFrontend, wait_until
from support.engine.frontend.scripted_controller import say
from support.engine.text.tiny_tokenizer import turn_ids, write_model

PLAIN = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
SIMPLE = {"type": "object", "properties": {"a": {"type": "integer"}}}


def endless(name: str) -> dict[str, Any]:
    """A schema of 1 kB that takes hours to compile, or all memory: 50 MB in the first 0.2 s."""
    return {"allOf": [{"type": "string", "pattern": f".*{name}{number}.*"} for number in range(20)]}


def constrained(schema: dict[str, Any]) -> dict[str, Any]:
    return PLAIN | {
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def frontend(model: Path) -> Iterator[RunningFrontend]:
    """A frontend whose limits end no check: one that is under way stays so until a test ends it."""
    script = say(turn_ids("dog"))
    with RunningFrontend(model, script, grammar_seconds=3600.0, grammar_memory=1 << 40) as running:
        yield running


def post(frontend: RunningFrontend, body: dict[str, Any]) -> httpx.Response:
    with httpx.Client(base_url=frontend.url, timeout=60) as http:
        return http.post("/v1/chat/completions", json=body)


def checking() -> list[int]:
    """Processes that check a grammar at present: children of a keeper, which this process has
    started, as the frontend is a thread of it. Clusters that tests share have processes too.
    """
    found = []
    for keeper in psutil.Process().children():
        with suppress(psutil.Error):
            if "lockstep.engine.frontend.grammars.keeper" in keeper.cmdline():
                found += [child.pid for child in keeper.children()]
    return found


def test_the_limit_of_time_ends_an_endless_schema(model: Path) -> None:
    with RunningFrontend(model, say([]), grammar_seconds=0.2, grammar_memory=1 << 40) as frontend:
        answer = post(frontend, constrained(endless("cut")))
        assert answer.status_code == 400
        assert "more than 0.2 s (frontend.grammar_seconds)" in answer.json()["error"]["message"]


def test_eight_endless_schemas_keep_no_other_request_waiting(frontend: RunningFrontend) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with ThreadPoolExecutor(8) as pool:
        bad = [pool.submit(post, frontend, constrained(endless(name))) for name in "abcdefgh"]
        wait_until(lambda: len(checking()) >= PLACES - 1, "three schemas are being checked")
        for number in range(3):
            assert post(frontend, PLAIN).status_code == 200
            assert post(frontend, constrained(SIMPLE | {"title": f"{number}"})).status_code == 200
            assert frontend.http.get("/ready").status_code == 200
        assert sum(map(Future.done, bad)) <= 8 - (PLACES - 1), "three keep their places"

        def cut() -> bool:
            for pid in checking():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGPROF)  # as the limit of time does
            return all(map(Future.done, bad))

        wait_until(cut, "all have an answer")
        answers = [future.result() for future in bad]
    for answer in answers:
        assert answer.status_code in (400, 503)
        if answer.status_code == 503:
            assert int(answer.headers["retry-after"]) > 0
    refused = [answer.json()["error"] for answer in answers if answer.status_code == 400]
    assert len(refused) >= PLACES - 1, "those that keep their places are checked to the end"
    for error in refused:
        assert error["param"] == "response_format.json_schema.schema"
        assert "(frontend.grammar_seconds)" in error["message"]
    wait_until(lambda: not checking(), "nothing is left behind")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10, "in kB"
    assert post(frontend, constrained(SIMPLE | {"title": "after"})).status_code == 200


def test_a_client_that_leaves_ends_the_check_of_its_schema(frontend: RunningFrontend) -> None:
    body = json.dumps(constrained(endless("left"))).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    host, port = frontend.url.removeprefix("http://").split(":")
    frontend.engine.submits.clear()
    with socket.create_connection((host, int(port)), timeout=10) as line:
        line.sendall(head.encode() + body)
        wait_until(lambda: len(checking()) == 1, "the schema is being checked")
    wait_until(lambda: not checking(), "the check has ended")
    assert not frontend.engine.submits


def test_each_field_is_named(frontend: RunningFrontend) -> None:
    wrong = {"type": "wrong"}
    for fields, param in (
        ({"structured_outputs": {"regex": "a("}}, "structured_outputs.regex"),
        ({"structured_outputs": {"json": wrong}}, "structured_outputs.json"),
        ({"structured_outputs": {"choice": ["x" * 300_000]}}, "structured_outputs.choice"),
        ({"response_format": constrained(wrong)["response_format"]}, "response_format.json_schema.schema"),
    ):
        answer = post(frontend, PLAIN | fields)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


def test_many_optional_properties_are_followed_or_refused_with_the_limit(frontend: RunningFrontend) -> None:
    def optional(count: int) -> dict[str, Any]:
        return {"type": "object", "properties": {f"field_{n}": {"type": "integer"} for n in range(count)}}

    assert post(frontend, PLAIN | {"structured_outputs": {"json": optional(600)}}).status_code == 200
    error = post(frontend, PLAIN | {"structured_outputs": {"json": optional(2000)}}).json()["error"]
    assert (error["code"], error["param"]) == (400, "structured_outputs.json")
    assert "too many choices at one place; the limit is 4000 items" in error["message"]


def test_keywords_that_say_nothing_and_those_that_cannot_be_held(frontend: RunningFrontend) -> None:
    secret = {"type": "object", "properties": {"key": {"type": "string", "format": "password"}}}
    assert post(frontend, constrained(secret)).status_code == 200
    unique = {"type": "object", "properties": {"list": {"type": "array", "uniqueItems": True}}}
    error = post(frontend, constrained(unique)).json()["error"]
    assert (error["code"], error["param"]) == (400, "response_format.json_schema.schema")
    assert "properties.list.uniqueItems cannot be held" in error["message"]


def test_routers_hear_of_checks_that_are_stuck_and_plain_requests_go_on(
    frontend: RunningFrontend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GrammarDesk, "trouble", "Grammars cannot be checked: a test says so")
    for path in ("/ready", "/health/generate"):
        answer = frontend.http.get(path)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        assert "a test says so" in answer.json()["error"]["message"]
    assert frontend.http.get("/health").status_code == 200
    assert post(frontend, PLAIN).status_code == 200
