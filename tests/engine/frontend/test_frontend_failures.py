"""Failures: clients get clear errors, and the engine is told when a client goes away."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from lockstep.engine.frontend import controller_link as client
from lockstep.engine.protocol.cluster_state import OverlapChoice, RankState
from lockstep.engine.protocol.frontends import Rejected, Submit
from lockstep.engine.protocol.message import Finish
from support.engine.frontend.running_frontend import RunningFrontend, wait_until
from support.engine.frontend.scripted_controller import Item, say
from support.engine.text.tiny_tokenizer import IM_END, tiny_tokenizer, write_model

USER = [{"role": "user", "content": "Hello"}]
WORDS = tiny_tokenizer().encode("The quick brown fox").ids


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def shared(model: Path) -> Iterator[RunningFrontend]:
    with RunningFrontend(model, say([*WORDS, IM_END])) as running:
        yield running


@pytest.fixture
def frontend(shared: RunningFrontend) -> Iterator[RunningFrontend]:
    shared.engine.submits.clear()
    shared.engine.aborts.clear()
    yield shared
    shared.engine.script, shared.engine.step_seconds = say([*WORDS, IM_END]), 0.001
    shared.engine.set_state(phase="serving", reason="")
    wait_until(lambda: shared.http.get("/ready").status_code == 200, "the frontend serves")
    wait_until(lambda: not shared.engine.open, "the engine runs nothing any more")
    wait_until(
        lambda: shared.http.get("/load").json()["server_load"] == 0, "the frontend holds no request any more"
    )


def endless(submit: Submit) -> Iterator[Item]:
    while True:
        yield [WORDS[0]]


def one_token_and_no_end(submit: Submit) -> Iterator[Item]:
    """Runs until it is aborted, and gives the frontend nothing to write."""
    yield [WORDS[0]]
    while True:
        yield None


def chat(frontend: RunningFrontend, **fields: Any) -> httpx.Response:
    return frontend.http.post("/v1/chat/completions", json={"messages": USER, **fields})


# -------------------------------------------------- refusals and errors of the engine


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_is_503_with_retry_after_also_for_streams(
    frontend: RunningFrontend, stream: bool
) -> None:
    frontend.engine.script = lambda submit: [Rejected(0, 503, "The queue is full", 3.2)]
    answer = chat(frontend, stream=stream)
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "4"
    assert answer.json()["error"] == {
        "message": "The queue is full",
        "type": "ServiceUnavailableError",
        "param": None,
        "code": 503,
    }


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_before_the_first_token_is_a_real_500(frontend: RunningFrontend, stream: bool) -> None:
    frontend.engine.script = lambda submit: [None, None, Finish.ERROR]
    answer = chat(frontend, stream=stream)
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "InternalServerError"


@pytest.mark.parametrize("stream", [False, True])
def test_what_a_drain_cuts_off_is_503_and_says_so(frontend: RunningFrontend, stream: bool) -> None:
    def cut_off(submit: Submit) -> Iterator[Item]:
        yield None
        frontend.engine.set_state(phase="draining")
        yield from [None] * 20
        yield Finish.ERROR

    frontend.engine.script = cut_off
    answer = chat(frontend, stream=stream)
    frontend.engine.set_state(phase="serving")
    wait_until(lambda: frontend.http.get("/ready").status_code == 200, "/ready shows serving")
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) >= 1
    assert "shutting down" in answer.json()["error"]["message"]


def test_one_rejected_choice_fails_the_request_and_aborts_the_rest(frontend: RunningFrontend) -> None:
    def script(submit: Submit) -> Iterator[Item]:
        if submit.sampling.seed == 1:
            yield Rejected(0, 503, "The queue is full", 1.0)
        while True:
            yield None

    frontend.engine.script = script
    assert chat(frontend, n=3, seed=0).status_code == 503
    wait_until(lambda: len(frontend.engine.aborts) == 2, "the other two choices are aborted")


def test_an_error_in_mid_stream_is_a_frame_then_done(frontend: RunningFrontend) -> None:
    begun = threading.Event()

    def script(submit: Submit) -> Iterator[Item]:
        yield from ([WORDS[0]], [WORDS[1]])
        while not begun.is_set():
            yield None
        yield Finish.ERROR

    frontend.engine.script = script
    with frontend.http.stream(
        "POST", "/v1/chat/completions", json={"messages": USER, "stream": True}
    ) as answer:
        assert answer.status_code == 200
        begun.set()
        frames = answer.read().decode().split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""]
    assert json.loads(frames[-3].removeprefix("data: "))["error"]["code"] == 500


def test_a_request_that_the_engine_took_for_given_up_goes_on(frontend: RunningFrontend) -> None:
    """The controller aborts all of a frontend that was silent for longer than its lease."""
    frontend.engine.script = lambda submit: [
        [WORDS[0]],
        *([[WORDS[1]], Finish.LENGTH] if submit.emitted_i32 else [Finish.ABORT]),
    ]
    [choice] = chat(frontend).json()["choices"]
    text = tiny_tokenizer().decode(WORDS[:2])
    assert (choice["finish_reason"], choice["message"]["content"]) == ("length", text)


def test_headers_of_a_stream_wait_for_the_first_token(frontend: RunningFrontend) -> None:
    def script(submit: Submit) -> Iterator[Item]:
        for _ in range(200):
            yield None
        yield from ([token] for token in [*WORDS, IM_END])

    frontend.engine.script = script
    began = time.monotonic()
    body = {"messages": USER, "stream": True}
    with frontend.http.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert time.monotonic() - began > 0.15
        assert answer.read().endswith(b"data: [DONE]\n\n")


# --------------------------------------------------------------------------- clients that go away


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_goes_away_aborts_at_once(frontend: RunningFrontend, stream: bool, n: int) -> None:
    frontend.engine.script = one_token_and_no_end
    host, port = frontend.url.removeprefix("http://").split(":")
    body = json.dumps({"messages": USER, "stream": stream, "n": n, "ignore_eos": True}).encode()
    with socket.create_connection((host, int(port)), timeout=30) as raw:
        raw.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s"
            % (len(body), body)
        )
        wait_until(lambda: len(frontend.engine.open) == n, "the request runs")
        if stream:
            assert raw.recv(100)
    # No more tokens come, so no write can notice the loss, and no request ends by itself.
    wait_until(lambda: len(frontend.engine.aborts) == n, "every choice is aborted", 10.0)


def test_two_hundred_streams_cut_in_the_middle_leave_nothing_behind(frontend: RunningFrontend) -> None:
    frontend.engine.script = endless
    frontend.engine.step_seconds = 0.1  # each would end by itself after fifty seconds
    host, port = frontend.url.removeprefix("http://").split(":")
    body = json.dumps({"messages": USER, "stream": True, "ignore_eos": True}).encode()
    request = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (
        len(body),
        body,
    )
    with ExitStack() as stack:
        streams = [
            stack.enter_context(socket.create_connection((host, int(port)), timeout=30)) for _ in range(200)
        ]
        for stream in streams:
            stream.sendall(request)
        for stream in streams:
            assert stream.recv(100).startswith(b"HTTP/1.1 200")
    wait_until(lambda: not frontend.engine.open, "all are aborted", 20.0)
    assert len(set(frontend.engine.aborts)) == len(frontend.engine.aborts) == 200, (
        "each handle is aborted once"
    )


def test_a_stop_string_aborts_the_engine_and_trims_the_usage(frontend: RunningFrontend) -> None:
    frontend.engine.script = endless
    answer = frontend.http.post(
        "/v1/completions",
        json={"prompt": "x", "max_tokens": 400, "stop": tiny_tokenizer().decode(WORDS[:1]) * 3},
    )
    document = answer.json()
    assert (document["choices"][0]["text"], document["usage"]["completion_tokens"]) == ("", 3)
    wait_until(lambda: len(frontend.engine.aborts) == 1, "the engine is told to stop")


# -------------------------------------------------- keys, draining, losing the controller


def test_keys(model: Path) -> None:
    with RunningFrontend(model, say([*WORDS, IM_END]), api_keys=("one", "two"), admin_key="root") as frontend:
        http = frontend.http
        for path in ("/health", "/ready", "/version", "/metrics", "/load"):
            assert http.get(path).status_code == 200, path
        for key in (None, "three", "root"):
            headers = {} if key is None else {"Authorization": f"Bearer {key}"}
            answer = http.get("/v1/models", headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, 401)
        assert http.get("/v1/models", headers={"Authorization": "Bearer two"}).status_code == 200
        assert http.get("/admin/cluster", headers={"Authorization": "Bearer two"}).status_code == 401
        admin = {"Authorization": "Bearer root"}
        state = http.get("/admin/cluster", headers=admin).json()
        assert (state["epoch"], state["phase"]) == (1, "serving")
        assert not {"totals", "placement_i32", "expert_i64"} & set(state), (
            "packed bytes tell a reader nothing"
        )
        assert state["placement"] == []
        assert state["overlap"] == {"mode": "off", "steps": 0, "last_step": False, "choices": []}
        ranks = tuple(RankState(rank, "here", 1, "serving", 0, 0, 0, 9, 0.0, 0.0) for rank in range(2))
        lines = array("i", [0, 1, 0, 0, 3, 0, 1, 1, 4, 7, 2, 2, 0, 1, 1, 2, 2, 0, 5, 7]).tobytes()
        choices = (OverlapChoice(16, 2, 0.25, 0.9),)
        frontend.engine.set_state(ranks=ranks, placement_i32=lines, overlap="auto", overlap_choices=choices)
        wait_until(
            lambda: http.get("/admin/cluster", headers=admin).json()["placement"], "the placement to be told"
        )
        assert http.get("/admin/cluster", headers=admin).json()["placement"] == [
            {"layers": [0, 1], "experts": [[[0, 3]], [[4, 7]]]},
            {"layers": [2, 2], "experts": [[[1, 1], [5, 7]], []]},
        ]
        overlap = http.get("/admin/cluster", headers=admin).json()["overlap"]
        assert overlap["mode"] == "auto" and overlap["choices"] == [
            {"capacity": 16, "microbatches": 2, "waits": 0.25, "ratio": 0.9}
        ]
        for wrong in ({"deadline": -1}, {"dead_line": 7}, []):
            assert http.post("/admin/drain", headers=admin, json=wrong).status_code == 400
        assert http.post("/admin/drain", headers=admin, json={"deadline": 7}).status_code == 202
        wait_until(
            lambda: [drain.deadline for drain in frontend.engine.drains] == [7.0],
            "the controller is told to drain",
        )


def test_admin_needs_a_configured_key(frontend: RunningFrontend) -> None:
    answer = frontend.http.get("/admin/cluster", headers={"Authorization": "Bearer x"})
    assert answer.status_code == 401
    assert "none is configured" in answer.json()["error"]["message"]


def test_phases(frontend: RunningFrontend) -> None:
    expected = {"starting": (503, 503), "draining": (200, 503), "drained": (503, 503), "failed": (503, 503)}
    for phase, (health, ready) in expected.items():
        frontend.engine.set_state(phase=phase, reason="because")
        wait_until(lambda: frontend.http.get("/ready").status_code == 503, f"/ready shows {phase}")
        wait_until(
            lambda expected=health: frontend.http.get("/health").status_code == expected,
            f"/health shows {phase}",
        )
        answer = chat(frontend)
        assert (answer.status_code, frontend.http.get("/ready").status_code) == (ready, ready)
        assert int(answer.headers["retry-after"]) >= 1
    frontend.engine.set_state(phase="serving", reason="")
    wait_until(lambda: frontend.http.get("/ready").status_code == 200, "/ready shows serving")
    assert chat(frontend).status_code == 200


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frontends notice silence within seconds."""
    monkeypatch.setattr(client, "BEAT", 0.25)
    monkeypatch.setattr(client, "SILENCE", 2.5)  # five states


@contextmanager
def stream(frontend: RunningFrontend) -> Iterator[httpx.Response]:
    body = {"messages": USER, "stream": True, "max_tokens": 60, "ignore_eos": True}
    with frontend.http.stream("POST", "/v1/chat/completions", json=body) as answer:
        yield answer


def text_of(frames: list[str]) -> str:
    chunks = [json.loads(frame.removeprefix("data: ")) for frame in frames if frame.startswith("data: {")]
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"])


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("lost", ["nothing", "a token", "the request"])
def test_a_stream_goes_on_when_a_silent_controller_is_back(model: Path, lost: str) -> None:
    script = say((WORDS * 20)[:60])
    with RunningFrontend(model, script) as frontend:
        with stream(frontend) as undisturbed:
            text = text_of(undisturbed.read().decode().split("\n\n"))
        frontend.engine.step_seconds = 0.05
        with stream(frontend) as answer:
            frontend.engine.silent = True
            wait_until(lambda: frontend.http.get("/health").status_code == 503, "the silence is noticed")
            refused = chat(frontend)
            assert (refused.status_code, frontend.http.get("/ready").status_code) == (503, 503)
            assert "The controller does not answer" in refused.json()["error"]["message"]
            [running] = frontend.engine.open.values()
            if lost == "a token":
                next(running.items)
                running.sent, running.left = running.sent + 1, running.left - 1
            elif lost == "the request":
                frontend.engine.open.clear()
            hellos, frontend.engine.silent = len(frontend.engine.hellos), False
            frames = answer.read().decode().split("\n\n")
        assert frames[-2:] == ["data: [DONE]", ""] and '"error"' not in frames[-3]
        assert text_of(frames) == text
        assert len(frontend.engine.hellos) > hellos, "it was greeted again, as a restarted one must be"
        assert frontend.http.get("/health").status_code == 200


@pytest.mark.usefixtures("impatient")
def test_requests_fail_when_the_controller_stays_silent(model: Path) -> None:
    with RunningFrontend(model, endless, pause_deadline=4.0) as frontend:
        frontend.engine.step_seconds = 0.05
        with stream(frontend) as answer:
            frontend.engine.silent = True
            frames = answer.read().decode().split("\n\n")
        assert frames[-2:] == ["data: [DONE]", ""]
        assert "The controller was lost" in json.loads(frames[-3].removeprefix("data: "))["error"]["message"]
        frontend.engine.open.clear()  # while it does nothing
        frontend.engine.script = say([*WORDS, IM_END])
        frontend.engine.silent = False
        wait_until(lambda: frontend.http.get("/health").status_code == 200, "the controller is found again")
        assert chat(frontend).json()["choices"][0]["message"]["content"] == "The quick brown fox"


# --------------------------------------------------------------------------- the process

CHILD = """
import sys, msgspec
from lockstep.engine.frontend.process import main
from lockstep.engine.protocol.specs import FrontendSpec
main(msgspec.json.decode(sys.argv[1], type=FrontendSpec))
assert "torch" not in sys.modules, "the frontend imported torch"
"""


@pytest.mark.parametrize("how", ["SIGTERM", "Stop"])
def test_the_process_leaves_cleanly_without_torch_while_a_stream_is_open(model: Path, how: str) -> None:
    idle = RunningFrontend(model, endless)  # not entered: only its engine and its spec are used
    spec = msgspec.json.encode(idle.spec).decode()
    with (
        closing(idle),
        subprocess.Popen([sys.executable, "-c", CHILD, spec], stderr=subprocess.PIPE, text=True) as child,
        killing(child),
    ):
        wait_until(lambda: _status(idle) == 200, "the child serves", 60)
        idle.engine.step_seconds = 0.1
        with idle.http.stream(
            "POST", "/v1/chat/completions", json={"messages": USER, "stream": True, "ignore_eos": True}
        ) as answer:
            if how == "SIGTERM":
                child.send_signal(signal.SIGINT)  # ignored: the launcher decides
                child.send_signal(signal.SIGTERM)
            else:
                idle.engine.stop()
            text = answer.read().decode()
        assert "shutting down" in text
        assert text.endswith("data: [DONE]\n\n")
        _, errors = child.communicate(timeout=60)
        assert child.returncode == 0, errors
        assert "Traceback" not in errors, errors
        wait_until(lambda: not idle.engine.open, "the engine was told to abort")


@contextmanager
def killing(child: subprocess.Popen[str]) -> Iterator[None]:
    try:
        yield
    finally:
        child.kill()


def _status(frontend: RunningFrontend) -> int:
    """The status of an answer; 0 while nobody listens, or nobody answers."""
    try:
        return frontend.http.get("/health").status_code
    except (httpx.ConnectError, httpx.ReadTimeout):
        return 0


def test_before_the_controller_answers_everything_is_503(model: Path) -> None:
    frontend = RunningFrontend(model, say([*WORDS, IM_END]))
    frontend.engine.silent = True
    frontend.start()
    try:
        wait_until(lambda: _status(frontend) == 503, "the server listens")
        assert frontend.http.get("/ready").status_code == 503
        answer = chat(frontend)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        assert "no message from the controller yet" in answer.json()["error"]["message"]
        frontend.engine.silent = False
        wait_until(lambda: _status(frontend) == 200, "a late controller is found")
    finally:
        frontend.stop()
