"""Heads, framing and manners of clients that are made to be expensive, over real sockets, against a
real frontend in a process of its own.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from support.engine.frontend.frontend_process import FrontendProcess, frontend_process
from support.engine.frontend.running_frontend import wait_until
from support.engine.frontend.scripted_controller import say
from support.engine.text.tiny_tokenizer import IM_END, tiny_tokenizer, write_model

WORDS = tiny_tokenizer().encode("The quick brown fox").ids
SCRIPT = say([*WORDS, IM_END])
STALL_SECONDS = 0.25
POST = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"
CHUNKED = POST + b"transfer-encoding: chunked\r\n\r\n"
ASK = json.dumps({"prompt": "x", "max_tokens": 2}).encode()
STREAM = json.dumps({"prompt": "x", "max_tokens": 4, "stream": True}).encode()
HEALTH = b"GET /health HTTP/1.1\r\nhost: x\r\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def frontend(model: Path) -> Iterator[FrontendProcess]:
    with frontend_process(model, SCRIPT) as running:
        yield running


def post(body: bytes, *headers: bytes, version: bytes = b"1.1") -> bytes:
    lines = [b"POST /v1/completions HTTP/" + version, b"host: x", b"content-length: %d" % len(body), *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def read_all(raw: socket.socket) -> bytes:
    """All that comes until the server closes."""
    parts = []
    with suppress(ConnectionError):
        while part := raw.recv(65536):
            parts.append(part)
    return b"".join(parts)


def talk(frontend: FrontendProcess, *pieces: bytes) -> bytes:
    """Sends all pieces, even after an answer; returns all that comes until the server closes."""
    with frontend.connect() as raw:
        sender = threading.Thread(target=_send, args=(raw, pieces))
        sender.start()
        said = read_all(raw)
        sender.join(60)
    return said


def _send(raw: socket.socket, pieces: tuple[bytes, ...]) -> None:
    with suppress(OSError):
        for piece in pieces:
            raw.sendall(piece)


def answers(said: bytes) -> list[tuple[int, bytes]]:
    """Status and body of each answer with a Content-Length."""
    found = []
    while said:
        head, _, rest = said.partition(b"\r\n\r\n")
        lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        length = int(lengths[0].split(b":")[1]) if lengths else len(rest)
        found.append((int(head.split(b" ")[1]), rest[:length]))
        said = rest[length:]
    return found


def error_of(body: bytes) -> dict[str, Any]:
    error: dict[str, Any] = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


MB = 2**20
LARGEST = 7 * MB + 65536  # bytes of a body where limits are strict
CLOSE = b"connection: close\r\n"
REFUSED: dict[str, tuple[int, tuple[bytes, ...]]] = {
    "a header of 65 KiB": (431, (HEALTH + b"x: " + b"a" * 66_560 + b"\r\n\r\n",)),
    "a header of 48 MiB": (431, (HEALTH + b"x: ", *[b"a" * MB] * 48)),
    "a header's name of 48 MiB": (431, (HEALTH, *[b"a" * MB] * 48)),
    "a header of 8 MiB in small pieces": (431, (HEALTH + b"x: ", *[b"a" * 1000] * 8000)),
    "a path of 8 MiB": (431, (b"GET /", *[b"a" * MB] * 8)),
    "a query of 100 KiB": (431, (b"GET /health?" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",)),
    "20,000 headers": (431, (HEALTH + b"a: b\r\n" * 20_000 + b"\r\n",)),
    "headers without end": (431, (HEALTH, *[b"abc: defgh\r\n" * 1000] * 2000)),
    "a method of 1 MiB": (400, (b"A" * MB,)),
    "line breaks without end": (431, (b"\r\n" * MB, HEALTH + b"\r\n")),
    "zeros": (400, (b"\0" * MB,)),
    "a trailer of 8 MiB": (431, (CHUNKED + b"1\r\n1\r\n0\r\nx: ", *[b"a" * 4000] * 2000)),
    "trailers without end": (431, (CHUNKED + b"1\r\n1\r\n0\r\n", *[b"abc: defgh\r\n" * 1000] * 2000)),
    "a chunk's extension of 8 MiB": (431, (CHUNKED + b"1;x=", *[b"a" * MB] * 8)),
    "chunks of one byte": (400, (CHUNKED, *[b"1\r\n \r\n" * 10_000] * 40)),
    "a chunk's size of 70 bits": (400, (CHUNKED + b"f" * 18 + b"\r\n",)),
    "a length of 70 bits": (400, (POST + b"content-length: " + b"9" * 21 + b"\r\n\r\n",)),
    "a negative length": (400, (POST + b"content-length: -1\r\n\r\n",)),
    "two lengths": (400, (POST + b"content-length: 1\r\ncontent-length: 2\r\n\r\n11",)),
    "a length and chunks": (
        400,
        (POST + b"content-length: 9\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",),
    ),
    "a length beyond the limit": (413, (POST + b"content-length: 99999999999\r\n" + CLOSE + b"\r\n",)),
    "chunks beyond the limit": (
        413,
        (POST + CLOSE + b"transfer-encoding: chunked\r\n\r\n", *[b"100000\r\n" + b" " * MB + b"\r\n"] * 9),
    ),
    "a body longer than its length": (400, (post(ASK[:-1]) + b"}}}}\r\n\r\n",)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_message_is_refused(frontend: FrontendProcess, name: str) -> None:
    status, pieces = REFUSED[name]
    frontend.reset()
    before = frontend.cpu_seconds
    said = answers(talk(frontend, *pieces))
    used = frontend.cpu_seconds - before
    assert said, "the connection was closed without an answer"
    assert said[-1][0] == status, said
    assert error_of(said[-1][1])["code"] == status
    assert frontend.stall < STALL_SECONDS
    assert used < 1.0
    print(f"{name}: {used:.3f} s of CPU, {frontend.stall:.3f} s of the loop: {said[-1][1]!r}")
    assert frontend.http.get("/health").status_code == 200


def test_a_head_of_60_kib_is_served(frontend: FrontendProcess) -> None:
    answer = frontend.http.get("/health", headers={"x": "a" * 60_000})
    assert answer.status_code == 200
    [(status, _)] = answers(talk(frontend, HEALTH + b"a: b\r\n" * 5000 + CLOSE + b"\r\n"))
    assert status == 200


def test_a_body_in_chunks_with_trailers_is_served_without_them(frontend: FrontendProcess) -> None:
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (ASK[:5], ASK[5:]))
    message = POST + CLOSE + b"transfer-encoding: chunked\r\ntrailer: x-request-id\r\n\r\n" + chunks
    said = talk(frontend, message + b"0\r\nx-request-id: from-a-trailer\r\n\r\n")
    assert answers(said)[0][0] == 200
    assert b"from-a-trailer" not in said


def test_ten_thousand_pipelined_requests_are_answered_in_turns(frontend: FrontendProcess) -> None:
    """One packet after the other holds thousands of requests: the loop gets its turns meanwhile."""
    frontend.reset()
    last = HEALTH + CLOSE + b"\r\n"
    said = answers(talk(frontend, (HEALTH + b"\r\n") * 5000 + post(ASK) + last))
    assert [status for status, _ in said] == [200] * 5002
    assert "choices" in json.loads(said[5000][1])
    assert frontend.stall < STALL_SECONDS


def test_garbage_after_a_request_does_not_reach_its_answer(frontend: FrontendProcess) -> None:
    said = answers(talk(frontend, post(ASK) + b"\0\0\0"))
    assert [status for status, _ in said] == [200, 400]
    assert "choices" in json.loads(said[0][1])
    assert error_of(said[1][1])["code"] == 400


def test_a_client_that_leaves_after_pipelining_frees_its_request(frontend: FrontendProcess) -> None:
    """The request that is answered hears of it, not only the one that waits behind it."""
    body = json.dumps({"prompt": "x", "max_tokens": 400, "ignore_eos": True}).encode()

    def num_open() -> int:
        return int(frontend.http.get("/load").json()["server_load"])

    frontend.engine.script = say([])
    try:
        with frontend.connect() as raw:
            raw.sendall(post(body) + post(body))
            wait_until(lambda: num_open() == 1, "the first is being answered")
        wait_until(lambda: num_open() == 0, "its request is given up")
    finally:
        frontend.engine.script = SCRIPT
    assert frontend.http.post("/v1/completions", content=ASK).status_code == 200


# --------------------------------------------------------------------------- HTTP/1.0


def test_an_http_1_0_client_gets_a_stream_without_chunks(frontend: FrontendProcess) -> None:
    said = talk(frontend, post(STREAM, version=b"1.0"))
    head, _, body = said.partition(b"\r\n\r\n")
    assert b" 200 " in head.split(b"\r\n")[0]
    assert b"transfer-encoding" not in head.lower()
    assert b"connection: close" in head.lower()
    events = body.split(b"\n\n")
    assert events[-2:] == [b"data: [DONE]", b""]
    assert all(event.startswith(b"data: {") for event in events[:-2])
    text = "".join(json.loads(event[6:])["choices"][0]["text"] for event in events[:-2])
    assert text == tiny_tokenizer().decode(WORDS[:4])


@pytest.mark.parametrize("connection", [b"connection: close", b"connection: keep-alive"])
def test_an_http_1_0_client_gets_documents_and_errors(frontend: FrontendProcess, connection: bytes) -> None:
    for body, status in ((ASK, 200), (b"{", 400)):
        [(said, document)] = answers(talk(frontend, post(body, connection, version=b"1.0")))
        assert said == status
        assert json.loads(document)
    for method, length in ((b"HEAD", 0), (b"GET", len(b'{"status":"ok"}'))):
        said_all = talk(frontend, method + b" /health HTTP/1.0\r\n\r\n")
        assert len(said_all.partition(b"\r\n\r\n")[2]) == length


# --------------------------------------------------------------------------- deadlines and limits


@pytest.fixture(scope="module")
def strict(model: Path) -> Iterator[FrontendProcess]:
    """Short deadlines, few connections, little memory."""
    limits: dict[str, Any] = {"head_deadline": 1.0, "body_deadline": 1.5, "idle_deadline": 1.0}
    limits |= {"read_deadline": 1.0, "max_connections": 20, "max_body": LARGEST, "body_memory": 8 * MB}
    with frontend_process(model, say(WORDS * 100), **limits) as running:
        yield running


def slowly(frontend: FrontendProcess, first: bytes, drop: bytes) -> tuple[bytes, float]:
    """Sends a byte now and then until the server ends it. Returns what it said, and the seconds."""
    began = time.monotonic()
    with frontend.connect() as raw:
        raw.sendall(first)
        raw.settimeout(0.1)
        said = b""
        while time.monotonic() < began + 30:
            with suppress(TimeoutError):
                part = raw.recv(65536)
                said += part
                if not part:
                    break
                continue
            with suppress(OSError):
                raw.sendall(drop)
        return said, time.monotonic() - began


DRIPPING = {
    "request line": (b"GET /hea", b"l", "head_deadline"),
    "headers": (HEALTH, b"a: b\r\n", "head_deadline"),
    "body": (POST + b"content-length: 1000\r\n\r\n", b" ", "body_deadline"),
    "chunks": (CHUNKED, b"1\r\n \r\n", "body_deadline"),
    "trailers": (CHUNKED + b"1\r\n1\r\n0\r\n", b"a: b\r\n", "body_deadline"),
}


@pytest.fixture(scope="module")
def ends(strict: FrontendProcess) -> dict[str, tuple[bytes, float]]:
    """Answers to dripping requests, and the seconds until each ended; all drip at once."""
    with ThreadPoolExecutor(len(DRIPPING)) as pool:
        ended = {
            name: pool.submit(slowly, strict, first, drop) for name, (first, drop, _) in DRIPPING.items()
        }
        return {name: future.result() for name, future in ended.items()}


@pytest.mark.parametrize("name", DRIPPING)
def test_a_request_that_drips_is_408(name: str, ends: dict[str, tuple[bytes, float]]) -> None:
    said, seconds = ends[name]
    [(status, body)] = answers(said)
    assert status == 408
    error = error_of(body)
    assert error["type"] == "RequestTimeoutError"
    assert f"frontend.{DRIPPING[name][2]}" in error["message"]
    assert seconds < 20


def test_a_connection_that_asks_nothing_is_closed(strict: FrontendProcess) -> None:
    with strict.connect() as never, strict.connect() as once:
        once.sendall(HEALTH + b"\r\n")
        assert read_all(never) == b""
        assert [status for status, _ in answers(read_all(once))] == [200]


def test_a_stream_outlives_all_deadlines(strict: FrontendProcess) -> None:
    """No deadline runs while an answer is written: this one takes longer than each of them."""
    body = json.dumps({"prompt": "x", "max_tokens": 300, "stream": True, "ignore_eos": True}).encode()
    said = b""
    with strict.connect() as raw:
        raw.sendall(post(body))
        began = time.monotonic()
        while b"[DONE]" not in said:
            part = raw.recv(200)
            assert part, said[-300:]
            said += part
            time.sleep(max(0.0, 3.0 - (time.monotonic() - began)) / 200)
    assert said.count(b'"finish_reason":"length"') == 1


def test_a_client_that_reads_nothing_is_cut_off(strict: FrontendProcess) -> None:
    """It asks again and again for more than the sockets' buffers hold; memory does not grow."""
    body = json.dumps({"prompt": "word " * 200_000, "return_token_strs": True}).encode()
    ask = b"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.settimeout(60)
        raw.connect(("127.0.0.1", strict.port))
        with suppress(OSError):
            for _ in range(40):
                raw.sendall(ask)
        wait_until(lambda: _broken(raw), "the connection ends")
    assert strict.http.get("/health").status_code == 200
    assert strict.memory < 2**30


def _broken(raw: socket.socket) -> bool:
    """Whether the other side has closed, without reading anything."""
    return raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) in (b"\x07", b"\x08")


def test_waiting_connections_give_way_to_new_ones(strict: FrontendProcess) -> None:
    with ExitStack() as stack:
        for number in range(60):
            raw = stack.enter_context(strict.connect())
            raw.sendall(b"" if number % 2 else b"GET /hea")
        for _ in range(5):
            [(status, _)] = answers(talk(strict, HEALTH + CLOSE + b"\r\n"))
            assert status == 200


def test_beyond_the_limit_new_clients_are_told_and_health_answers(strict: FrontendProcess) -> None:
    body = json.dumps({"prompt": "x", "max_tokens": 400, "stream": True, "ignore_eos": True}).encode()
    with ExitStack() as stack:
        wait_until(lambda: strict.http.get("/load").json()["server_load"] == 0, "no open requests")
        busy = [stack.enter_context(strict.connect()) for _ in range(20)]
        for raw in busy:
            raw.sendall(post(body))
            assert b" 200 " in raw.recv(15)
        [(status, refused)] = answers(talk(strict, post(ASK)))
        [(health, _)] = answers(talk(strict, HEALTH + CLOSE + b"\r\n"))
        still = all(b"[DONE]" not in raw.recv(65536, socket.MSG_PEEK) for raw in busy)
    if still:  # else the streams were over before
        assert (status, health) == (503, 200)
        error = error_of(refused)
        assert error["type"] == "ServiceUnavailableError"
        assert "frontend.max_connections" in error["message"]


def test_a_body_may_be_as_large_as_configured(strict: FrontendProcess) -> None:
    for size, status in ((LARGEST, 200), (LARGEST + 1, 413)):
        answer = strict.http.post("/v1/completions", content=ASK.rjust(size))
        assert answer.status_code == status, answer.text
    assert f"larger than {LARGEST} bytes (frontend.max_body)" in answer.json()["error"]["message"]


def test_bodies_beyond_the_memory_are_503_and_small_ones_served(strict: FrontendProcess) -> None:
    large = b" " * (5 * MB)
    with strict.connect() as first, strict.connect() as second:
        for raw in (first, second):
            raw.sendall(POST + b"content-length: %d\r\n\r\n" % (6 * MB) + large)
        small = strict.http.post("/v1/completions", content=ASK)
        assert small.status_code == 200
        answered = [answers(read_all(raw)) for raw in (first, second)]
    assert sorted(said[0][0] for said in answered) == [408, 503]
    [refused] = [said for said in answered if said[0][0] == 503]
    assert "frontend.body_memory" in error_of(refused[0][1])["message"]
    wait_until(
        lambda: strict.http.post("/v1/completions", content=b" " * (7 * MB) + ASK).status_code == 200,
        "the memory is free again",
    )
