"""Schemas that take for ever, against a real frontend: others go on, and nothing is left behind."""

from __future__ import annotations

import json
import resource
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from lockstep.engine.frontend.grammars.desk import GrammarDesk
from support.engine.frontend.running_frontend import RunningFrontend, wait_until
from support.engine.frontend.scripted_controller import say
from support.engine.text.tiny_tokenizer import turn_ids, write_model

PLAIN = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
SIMPLE = {"type": "object", "properties": {"a": {"type": "integer"}}}


def endless(name: str) -> dict[str, Any]:
    return {"allOf": [{"type": "string", "pattern": f".*{name}{number}.*"} for number in range(20)]}


def constrained(schema: dict[str, Any]) -> dict[str, Any]:
    return PLAIN | {
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    }


@pytest.fixture(scope="module")
def frontend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningFrontend]:
    model = write_model(tmp_path_factory.mktemp("model"))
    tokens = turn_ids("dog")
    with RunningFrontend(model, say(tokens), grammar_seconds=1.0, grammar_memory=64 << 20) as running:
        yield running


def post(frontend: RunningFrontend, body: dict[str, Any]) -> httpx.Response:
    with httpx.Client(base_url=frontend.url, timeout=60) as http:
        return http.post("/v1/chat/completions", json=body)


def checked_now() -> int:
    """Processes that check a grammar at present: grandchildren of this process, in which the
    frontend runs as a thread.
    """
    found = 0
    for listing in Path("/proc/self/task").glob("*/children"):
        for child in listing.read_text().split():
            path = Path(f"/proc/{child}/task/{child}/children")
            found += len(path.read_text().split()) if path.exists() else 0
    return found


def test_four_endless_schemas_keep_no_other_request_waiting(frontend: RunningFrontend) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with ThreadPoolExecutor(8) as pool:
        bad = [pool.submit(post, frontend, constrained(endless(name))) for name in "abcdefgh"]
        wait_until(lambda: checked_now() >= 3, "three schemas are being checked")
        for number in range(3):
            assert post(frontend, PLAIN).status_code == 200
            assert post(frontend, constrained(SIMPLE | {"title": f"{number}"})).status_code == 200
            assert frontend.http.get("/ready").status_code == 200
        assert not all(future.done() for future in bad), "those in between were quick enough"
        answers = [future.result() for future in bad]
    for answer in answers:
        assert answer.status_code in (400, 503)
        if answer.status_code == 503:
            assert int(answer.headers["retry-after"]) > 0
    refused = [answer.json()["error"] for answer in answers if answer.status_code == 400]
    assert refused, "at least those that found a place are checked"
    for error in refused:
        assert error["param"] == "response_format.json_schema.schema"
        assert "(frontend.grammar_" in error["message"]
    wait_until(lambda: not checked_now(), "nothing is left behind")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10, "in kB"
    assert post(frontend, constrained(SIMPLE | {"title": "after"})).status_code == 200


def test_a_client_that_leaves_ends_the_check_of_its_schema(frontend: RunningFrontend) -> None:
    body = json.dumps(constrained(endless("left"))).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    host, port = frontend.url.removeprefix("http://").split(":")
    frontend.engine.submits.clear()
    began = time.monotonic()
    with socket.create_connection((host, int(port)), timeout=10) as line:
        line.sendall(head.encode() + body)
        wait_until(lambda: checked_now() == 1, "the schema is being checked")
    wait_until(lambda: not checked_now(), "the check has ended")
    assert not frontend.engine.submits
    assert time.monotonic() - began < 30


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
