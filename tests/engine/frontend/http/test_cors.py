"""Pages of other origins: preflights, the headers of every answer, and the origins of a recipe."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from lockstep.engine.frontend.http.cors import Cors
from lockstep.engine.protocol.frontends import Rejected
from support.engine.frontend.running_frontend import RunningFrontend
from support.engine.frontend.scripted_controller import say
from support.engine.text.tiny_tokenizer import IM_END, write_model

KEY = {"Authorization": "Bearer k1"}
ASKS = {
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
}
CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "Hello"}]}


def running(folder: object, origins: tuple[str, ...]) -> RunningFrontend:
    return RunningFrontend(
        write_model(folder),  # type: ignore[arg-type]
        say([5, 6, IM_END]),
        api_keys=("k1",),
        admin_key="a1",
        cors_origins=origins,
    )


@pytest.fixture(scope="module")
def frontend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningFrontend]:
    with running(tmp_path_factory.mktemp("model"), ("localhost", "https://chat.example.com")) as started:
        yield started


def preflight(frontend: RunningFrontend, origin: str, path: str = CHAT, **more: str) -> httpx.Response:
    return frontend.http.options(path, headers={"Origin": origin} | ASKS | more)


@pytest.mark.parametrize(
    "origin",
    [
        "http://localhost",
        "http://localhost:3000",
        "https://localhost:8443",
        "http://127.0.0.1:5173",
        "http://[::1]:80",
        "https://chat.example.com",
    ],
)
def test_a_page_of_an_allowed_origin_may_ask_without_a_key_first(
    frontend: RunningFrontend, origin: str
) -> None:
    answer = preflight(frontend, origin)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == origin
    assert answer.headers["access-control-allow-headers"] == ASKS["Access-Control-Request-Headers"]
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert "Origin" in answer.headers["vary"]
    assert "access-control-allow-credentials" not in answer.headers
    assert answer.headers["x-request-id"]


@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.example",
        "http://localhost.evil.example",
        "http://localhost:3000.evil.example",
        "http://localhost@evil.example",
        "http://evil.example/localhost",
        "http://127.0.0.1.evil.example",
        "http://127.0.0.11",
        "http://localhost:123456",
        "http://localhost:3000\\evil",
        "https://chat.example.com.evil.example",
        "http://chat.example.com",
        "ftp://localhost",
        "null",
        "*",
    ],
)
def test_a_page_of_another_origin_gets_no_permission(frontend: RunningFrontend, origin: str) -> None:
    refused = preflight(frontend, origin)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, 400)
    assert origin in refused.json()["error"]["message"]
    assert "frontend.cors_origins" in refused.json()["error"]["message"]
    plain = frontend.http.get("/v1/models", headers=KEY | {"Origin": origin})
    assert plain.status_code == 200, "only a browser keeps it from the page"
    for answer in (refused, plain):
        assert "access-control-allow-origin" not in answer.headers
        assert "Origin" in answer.headers["vary"]


def test_a_refused_method_is_named(frontend: RunningFrontend) -> None:
    answer = preflight(frontend, "http://localhost", **{"Access-Control-Request-Method": "DELETE"})
    assert answer.status_code == 400
    assert "DELETE is not among the methods GET" in answer.json()["error"]["message"]


def test_every_answer_carries_the_headers(frontend: RunningFrontend) -> None:
    page = {"Origin": "http://localhost:3000"}
    answers = {
        200: frontend.http.get("/v1/models", headers=page | KEY),
        400: frontend.http.post(CHAT, headers=page | KEY, content=b"{"),
        401: frontend.http.post(CHAT, headers=page, json=BODY),
        404: frontend.http.get("/v1/nothing", headers=page | KEY),
        405: frontend.http.get(CHAT, headers=page | KEY),
    }
    frontend.engine.script = lambda submit: [Rejected(submit.handle, 503, "full", 3.0)]
    answers[503] = frontend.http.post(CHAT, headers=page | KEY, json=BODY)
    frontend.engine.script = say([5, 6, IM_END])
    for status, answer in answers.items():
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == page["Origin"], status
        assert answer.headers.get_list("vary") == ["Origin"]
        assert "x-request-id" in answer.headers["access-control-expose-headers"].lower()
        assert "retry-after" in answer.headers["access-control-expose-headers"].lower()
    assert answers[503].headers["retry-after"] == "3"
    admin = frontend.http.get("/admin/cluster", headers=page)
    assert (admin.status_code, admin.headers["access-control-allow-origin"]) == (401, page["Origin"])


def test_a_stream_carries_them(frontend: RunningFrontend) -> None:
    headers = KEY | {"Origin": "http://localhost:3000"}
    answer = frontend.http.post(CHAT, headers=headers, json=BODY | {"stream": True})
    assert answer.headers["access-control-allow-origin"] == "http://localhost:3000"
    assert answer.text.endswith("data: [DONE]\n\n")


def test_chunks_of_a_stream_pass_none_of_the_layers(
    frontend: RunningFrontend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layers' ``send`` sees the start of the answer alone: they cost nothing per token."""
    seen: list[str] = []
    original = Cors.send

    async def watched(self: Cors, message: Any, send: Any, request_headers: Any) -> None:
        seen.append(message["type"])
        await original(self, message, send, request_headers)

    monkeypatch.setattr(Cors, "send", watched)
    headers = KEY | {"Origin": "http://localhost"}
    answer = frontend.http.post(CHAT, headers=headers, json=BODY | {"stream": True})
    assert answer.text.count("data: ") >= 3
    assert seen == ["http.response.start"]


def test_a_failure_of_ours_carries_them(frontend: RunningFrontend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lockstep.engine.frontend.http.app.describe_cluster", lambda state: 1 / 0)
    headers = {"Authorization": "Bearer a1", "Origin": "http://localhost"}
    answer = frontend.http.get("/admin/cluster", headers=headers)
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (500, "http://localhost")


def test_all_origins(tmp_path_factory: pytest.TempPathFactory) -> None:
    with running(tmp_path_factory.mktemp("model"), ("*",)) as frontend:
        for answer in (
            preflight(frontend, "https://anywhere.example"),
            preflight(frontend, "null"),
            frontend.http.get("/v1/models", headers={"Origin": "null", "Cookie": "session=1"}),
        ):
            assert answer.headers["access-control-allow-origin"] == "*"
            assert "access-control-allow-credentials" not in answer.headers, "not allowed beside *"


def test_no_origins(tmp_path_factory: pytest.TempPathFactory) -> None:
    with running(tmp_path_factory.mktemp("model"), ()) as frontend:
        refused = preflight(frontend, "http://localhost")
        assert refused.status_code == 401
        plain = frontend.http.get("/v1/models", headers=KEY | {"Origin": "http://localhost"})
        for answer in (refused, plain):
            assert not [name for name in answer.headers if name.startswith("access-control")]
