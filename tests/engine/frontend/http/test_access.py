"""Keys, HEAD, slashes at the end of a path, and the line that each request leaves in the log."""

from __future__ import annotations

import logging
import re
import socket
import threading
from collections.abc import Iterator

import pytest

from lockstep.engine.protocol.frontends import Rejected, Submit
from lockstep.engine.protocol.message import Finish
from support.engine.frontend.running_frontend import RunningFrontend, wait_until
from support.engine.frontend.scripted_controller import say
from support.engine.text.tiny_tokenizer import IM_END, write_model

KEY = {"Authorization": "Bearer k1"}
CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "the secret word"}]}
GETS = ["/v1/models", "/v1/models/tiny", "/health", "/ready", "/ping", "/version", "/metrics", "/load"]
GETS += ["/tokenizer_info", "/docs", "/openapi.json"]
SCRIPT = say([5, 6, 7, IM_END])


@pytest.fixture(scope="module")
def frontend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningFrontend]:
    folder = write_model(tmp_path_factory.mktemp("model"))
    with RunningFrontend(folder, SCRIPT, api_keys=("k1",), admin_key="a1", access_log=True) as running:
        running.http.headers.update(KEY)
        yield running


@pytest.fixture
def lines(frontend: RunningFrontend, caplog: pytest.LogCaptureFixture) -> list[str]:
    """The lines of requests, as they come: after the answer, so a test waits for them."""
    caplog.set_level(logging.INFO, "lockstep.frontend.requests")
    found: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(f"{record.levelname} {record.getMessage()}")

    logger, handler = logging.getLogger("lockstep.frontend.requests"), Kept()
    logger.addHandler(handler)
    yield found  # type: ignore[misc]
    logger.removeHandler(handler)


def line_of(lines: list[str], request_id: str) -> str:
    def found() -> list[str]:
        return [line for line in lines if f"id={request_id} " in line]

    wait_until(found, f"the line of {request_id}")
    [line] = found()
    return line


def test_choices_are_counted_by_prompt(frontend: RunningFrontend) -> None:
    def sums() -> dict[str, float]:
        text = frontend.http.get("/metrics").text
        found = re.findall(r"^vllm:(request_\w+)_(?:sum|count)\{[^}]*\} (\S+)$", text, re.MULTILINE)
        names = [f"{name} {index % 2}" for index, (name, _) in enumerate(found)]
        return dict(zip(names, (float(value) for _, value in found), strict=True))

    before = sums()
    ask = {"prompt": ["one", "two"], "n": 3, "max_tokens": 9}
    assert frontend.http.post("/v1/completions", json=ask).status_code == 200
    wait_until(lambda: sums()["request_params_n 0"] == before["request_params_n 0"] + 2, "two prompts")
    after = {name: value - before[name] for name, value in sums().items()}
    assert after["request_params_n 1"] == 2 * 3
    assert after["request_params_max_tokens 0"] == 6 and after["request_params_max_tokens 1"] == 6 * 9
    assert after["request_max_num_generation_tokens 1"] == 2 * 4
    assert after["request_num_preemptions 0"] == 6 and after["request_num_preemptions 1"] == 0
    computed = after["request_prefill_kv_computed_tokens 1"]
    assert 0 < computed <= after["request_prompt_tokens 1"]


# --------------------------------------------------------------------------- keys and paths


@pytest.mark.parametrize("path", [CHAT, "/v1/models", "/admin/cluster", "/v1/nothing"])
@pytest.mark.parametrize("authorization", ["", "Bearer wrong", "Basic k1", "Bearer"])
def test_without_a_valid_key_the_answer_names_the_scheme(
    frontend: RunningFrontend, path: str, authorization: str
) -> None:
    answer = frontend.http.get(path, headers={"Authorization": authorization})
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")


@pytest.mark.parametrize("path", GETS)
def test_head_is_get_without_the_body(frontend: RunningFrontend, path: str) -> None:
    head, get = frontend.http.head(path), frontend.http.get(path)
    assert (head.status_code, head.content) == (200, b"") == (get.status_code, b"")
    assert head.headers["content-type"] == get.headers["content-type"]
    if path not in ("/metrics", "/load", "/tokenizer_info"):  # which change with each request
        assert head.headers["content-length"] == get.headers["content-length"]
    assert frontend.http.get("/version").status_code == 200, "the connection is still in step"


def test_head_where_there_is_no_get(frontend: RunningFrontend) -> None:
    assert frontend.http.head(CHAT).status_code == 405
    assert frontend.http.head(CHAT).headers["allow"] == "POST"
    assert frontend.http.head("/v1/nothing").status_code == 404
    assert frontend.http.head("/v1/models", headers={"Authorization": ""}).status_code == 401
    wrong = frontend.http.post("/v1/models")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "GET, HEAD")
    assert "POST is not allowed at /v1/models: only GET, HEAD" in wrong.json()["error"]["message"]


def test_a_slash_at_the_end_changes_nothing(frontend: RunningFrontend) -> None:
    for path in GETS:
        answer = frontend.http.get(path + "/")
        assert (answer.status_code, answer.history) == (200, []), path
    answer = frontend.http.post(CHAT + "/", json=BODY)
    assert answer.json()["choices"][0]["finish_reason"] == "stop"
    assert frontend.http.get("/admin/cluster/").status_code == 401
    assert frontend.http.get("/admin/").status_code == 200
    assert frontend.http.get("/").status_code == 404
    assert frontend.http.get("//v1/models").status_code == 404


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/audio/speech", "/api/generate"])
def test_an_unknown_path_is_told_what_is_served(frontend: RunningFrontend, path: str) -> None:
    error = frontend.http.post(path, json={}).json()["error"]
    assert error["code"] == 404
    assert path in error["message"]
    assert "/v1/chat/completions, /v1/completions" in error["message"]
    assert "/openapi.json" in error["message"]


def test_the_names_of_sagemaker(frontend: RunningFrontend) -> None:
    chat = frontend.http.post("/invocations", json=BODY).json()
    assert (chat["object"], chat["choices"][0]["finish_reason"]) == ("chat.completion", "stop")
    text = frontend.http.post("/invocations", json={"prompt": "a"}).json()
    assert text["object"] == "text_completion"
    stream = frontend.http.post("/invocations", json=BODY | {"stream": True})
    assert stream.text.endswith("data: [DONE]\n\n")
    for body in ({}, [], {"messages": 5}, {"prompt": None}):
        assert frontend.http.post("/invocations", json=body).status_code == 400
    assert frontend.http.get("/ping", headers={"Authorization": ""}).json() == {"status": "ok"}
    assert frontend.http.post("/invocations", headers={"Authorization": ""}, json=BODY).status_code == 401


# --------------------------------------------------------------------------- the log


def test_a_request_leaves_a_line(frontend: RunningFrontend, lines: list[str]) -> None:
    for name, more in (("find-me-42", {}), ("find-me-43", {"stream": True}), ("find-me-44", {"n": 2})):
        assert frontend.http.post(CHAT, headers={"X-Request-Id": name}, json=BODY | more).status_code == 200
        line = line_of(lines, name)
        assert re.fullmatch(
            rf"INFO request id={name} method=POST path={CHAT} status=200 prompt_tokens=\d+ cached_tokens=0"
            rf" completion_tokens={4 * (1 + ('n' in more))} queue=\d+\.\d+ first_token=\d+\.\d+ finish=stop"
            r" total=\d+\.\d+",
            line,
        ), line
        queue, first, total = (
            float(re.search(rf"\b{key}=(\S+)", line)[1])  # type: ignore[index]
            for key in ("queue", "first_token", "total")
        )
        assert queue <= first <= total


def test_refusals_leave_a_line_with_their_reason(frontend: RunningFrontend, lines: list[str]) -> None:
    def refused(name: str, status: int, *, key: str = "Bearer k1", **body: object) -> str:
        headers = {"X-Request-Id": name, "Authorization": key}
        assert frontend.http.post(CHAT, headers=headers, json=BODY | body).status_code == status
        line = line_of(lines, name)
        assert f"status={status}" in line
        return line

    assert "refusal=\"The model 'other' does not exist" in refused("r-404", 404, model="other")
    assert 'refusal="A valid API key is needed' in refused("r-401", 401, key="")
    assert 'refusal="temperature: Input should be less than or equal to 2"' in refused(
        "r-400", 400, temperature=3
    )
    assert "total=" in refused("r-401b", 401, key="Bearer k2")
    frontend.engine.script = lambda submit: [Rejected(submit.handle, 503, "1024 requests wait already", 3.0)]
    line = refused("r-503", 503)
    assert line.startswith("WARNING ") and 'refusal="1024 requests wait already"' in line
    frontend.engine.script = SCRIPT
    frontend.http.get("/v1/nowhere", headers={"X-Request-Id": "r-path"})
    assert "path=/v1/nowhere status=404" in line_of(lines, "r-path")


def test_a_stream_that_fails_says_so(frontend: RunningFrontend, lines: list[str]) -> None:
    begun = threading.Event()

    def script(submit: Submit) -> Iterator[list[int] | Finish | None]:
        yield [5]
        while not begun.is_set():
            yield None
        yield Finish.ERROR

    frontend.engine.script = script
    headers = {"X-Request-Id": "broken"}
    with frontend.http.stream("POST", CHAT, headers=headers, json=BODY | {"stream": True}) as answer:
        assert answer.status_code == 200
        parts = answer.iter_lines()
        next(parts)
        begun.set()
        assert "error" in "".join(parts)
    frontend.engine.script = SCRIPT
    line = line_of(lines, "broken")
    assert line.startswith("WARNING ")
    assert "status=200" in line and "finish=error" in line
    assert 'refusal="The engine could not finish this request"' in line


def test_a_client_that_leaves_is_told_apart(frontend: RunningFrontend, lines: list[str]) -> None:
    frontend.engine.script = say([5, 6])  # then silence
    headers = {"X-Request-Id": "gone"}
    with frontend.http.stream("POST", CHAT, headers=headers, json=BODY | {"stream": True}) as answer:
        next(answer.iter_lines())
    frontend.engine.script = SCRIPT
    assert "finish=abort" in line_of(lines, "gone")


def test_no_line_shows_a_prompt_or_a_query(frontend: RunningFrontend, lines: list[str]) -> None:
    secret = "the secret word"
    bodies = [
        BODY,
        {"messages": secret},
        {"messages": [{"role": "user", "content": {"text": secret}}]},
        {"messages": [secret]},
        BODY | {"stop": [secret, None]},
        BODY | {"temperature": secret},
    ]
    for number, body in enumerate(bodies):
        headers = {"X-Request-Id": f"s-{number}"}
        frontend.http.post(f"{CHAT}?api_key=hidden", headers=headers, json=body)
        line_of(lines, f"s-{number}")
    frontend.http.post("/v1/completions", headers={"X-Request-Id": "s-p"}, json={"prompt": [secret, 1]})
    line_of(lines, "s-p")
    assert not [line for line in lines if "secret" in line or "hidden" in line]


def test_probes_that_succeed_leave_no_line(frontend: RunningFrontend, lines: list[str]) -> None:
    for path in ("/health", "/ready", "/metrics", "/load", "/ping"):
        assert frontend.http.get(path, headers={"X-Request-Id": f"probe{path}"}).status_code == 200
    frontend.http.get("/v1/models", headers={"X-Request-Id": "last"})
    line_of(lines, "last")
    assert not [line for line in lines if "probe" in line]


@pytest.mark.parametrize("path", [b"/a%0Ab", b"/a%1b[31m", b"/" + b"x" * 5000, b"/\xc3\xa9", b'/"q"'])
def test_a_path_cannot_break_a_line(frontend: RunningFrontend, lines: list[str], path: bytes) -> None:
    host, port = frontend.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as raw:
        raw.sendall(
            b"GET " + path + b" HTTP/1.1\r\nHost: x\r\nX-Request-Id: odd\r\n"
            b"Authorization: Bearer k1\r\nConnection: close\r\n\r\n"
        )
        answer = b"".join(iter(lambda: raw.recv(4096), b""))
    if b" 404 " not in answer.partition(b"\r\n")[0]:
        return  # no HTTP for the server's parser
    line = line_of(lines, "odd")
    assert line.isprintable() and line.isascii()
    assert len(line) < 800


@pytest.mark.parametrize("name", ["x" * 129, "", "a b", "a\tb", "é"])
def test_an_id_that_could_break_a_line_is_replaced(
    frontend: RunningFrontend, lines: list[str], name: str
) -> None:
    headers = [(b"X-Request-Id", name.encode("latin-1"))]
    given = frontend.http.get("/version", headers=headers).headers["x-request-id"]
    assert re.fullmatch("[0-9a-f]{32}", given)
    line_of(lines, given)


def test_off_by_default_of_the_frontend(tmp_path_factory: pytest.TempPathFactory, lines: list[str]) -> None:
    with RunningFrontend(write_model(tmp_path_factory.mktemp("model")), SCRIPT) as quiet:
        quiet.http.post(CHAT, json=BODY, headers={"X-Request-Id": "quiet"})
        quiet.http.get("/v1/nowhere", headers={"X-Request-Id": "quiet"})
    assert not [line for line in lines if "quiet" in line]
