"""Bad input to the whole product gets a clear error in the shape of API.md, and the next request is
served as before.

``tests/engine/frontend`` goes through every field. These tests send what reaches further, and all
bad input at once beside good requests.
"""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from support.serving.mixed_asks import Oracle
from support.serving.served import EOS, MAX_LEN, VOCAB_SIZE, Ask, Body, Served

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
USER: list[Body] = [{"role": "user", "content": "Hello"}]
GOOD: Body = {
    "prompt": [5, 6, 7, 8],
    "max_tokens": 6,
    "temperature": 0.0,
    "ignore_eos": True,
    "return_token_ids": True,
}

REFUSED: list[tuple[str, Body, int, str | None, str]] = [
    (
        TEXT,
        {"prompt": [9] * (MAX_LEN + 1)},
        400,
        "prompt",
        "This model's maximum context length is 4096 tokens",
    ),
    (TEXT, {"prompt": [9] * MAX_LEN, "max_tokens": 1}, 400, "prompt", "maximum context length"),
    (TEXT, {"prompt": [9] * (MAX_LEN - 1), "max_tokens": 2}, 400, "max_tokens", "you requested 4097 tokens"),
    (TEXT, {"prompt": "word " * 6000}, 400, "prompt", "maximum context length"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": "word " * 6000}]},
        400,
        "messages",
        "maximum context length",
    ),
    (TEXT, {"prompt": [VOCAB_SIZE]}, 400, "prompt", "outside the vocabulary of 1024 ids"),
    (TEXT, {"prompt": [[5], [-1]]}, 400, "prompt", "token id -1"),
    (TEXT, {"prompt": "x", "stop_token_ids": [VOCAB_SIZE]}, 400, "stop_token_ids", "outside the vocabulary"),
    (
        TEXT,
        {"prompt": "x", "logit_bias": {"1024": 1.0}},
        400,
        "logit_bias",
        "ids from 0 to 1023",
    ),
    (
        TEXT,
        {"prompt": "x", "model": "gpt-4"},
        404,
        "model",
        "'gpt-4' does not exist; this server serves 'demo'",
    ),
    (CHAT, {"messages": USER, "model": "DEMO"}, 404, "model", "does not exist"),
    (
        CHAT,
        {"messages": [{"role": "pirate", "content": "arr"}]},
        400,
        "messages",
        "roles are system, user and assistant, not pirate",
    ),
    (CHAT, {"messages": USER, "temperature": 2.5}, 400, "temperature", "2"),
    (CHAT, {"messages": "Hello"}, 400, "messages", "messages"),
    (CHAT, {}, 400, "messages", "messages"),
    (TEXT, {"prompt": ["x"] * 100, "n": 128}, 400, None, "more than 1024 sequences"),
    (TEXT, {"prompt": "x", "max_tokens": -1}, 400, "max_tokens", "max_tokens"),
    (TEXT, {"prompt": "x", "top_p": "high"}, 400, "top_p", "top_p"),
    (TEXT, {"prompt": "x", "guided_regex": "a+"}, 400, None, "guided_regex"),
    (TEXT, {"prompt": [True, False]}, 400, "prompt", "prompt"),
]
BODIES = [
    b"",
    b"{",
    b"[1, 2]",
    b'{"prompt": "x"} trailing',
    b'{"prompt": "\xff\xfe"}',
    b'{"prompt": "\xc3"}',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "x", "temperature": NaN}',
    b'{"prompt": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    b"\x00" * 100,
]


@pytest.fixture(scope="module")
def good(demo: Served, oracle: Oracle) -> list[int]:
    """The tokens of a good request before any bad one; none of them is a close choice."""
    [known] = oracle.know(demo, [GOOD], GOOD["max_tokens"])
    assert len(known.tokens) == GOOD["max_tokens"]
    return known.tokens


@pytest.fixture(autouse=True)
def _serves_as_before(demo: Served, good: list[int]) -> Any:
    yield
    assert demo.ask(**GOOD).tokens == good
    assert demo.http.get("/ready").status_code == 200


def assert_error(answer: httpx.Response, status: int, message: str = "") -> Body:
    assert answer.status_code == status, answer.text
    document = answer.json()
    assert list(document) == ["error"]
    error: Body = document["error"]
    assert sorted(error) == ["code", "message", "param", "type"]
    assert error["code"] == status
    assert message in error["message"], error["message"]
    assert 0 < len(error["message"]) < 600
    assert not any(word in error["message"] for word in ("Traceback", "site-packages", ".py", "pydantic"))
    return error


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "message"), REFUSED, ids=[row[-1] for row in REFUSED]
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_fields(
    demo: Served, path: str, body: Body, status: int, param: str | None, message: str, stream: bool
) -> None:
    error = assert_error(demo.http.post(path, json=body | {"stream": stream}), status, message)
    assert param is None or error["param"].startswith(param)


@pytest.mark.parametrize("body", BODIES, ids=lambda body: repr(body[:40]))
def test_bodies(demo: Served, body: bytes) -> None:
    assert_error(demo.http.post(TEXT, content=body, headers={"Content-Type": "application/json"}), 400)


def test_ten_megabytes_are_413_and_five_of_text_400(demo: Served) -> None:
    assert_error(demo.http.post(TEXT, content=json.dumps({"prompt": "x" * 10_000_000})), 413)
    assert_error(demo.http.post(TEXT, content=json.dumps({"prompt": [9] * 3_400_000})), 413)
    assert_error(
        demo.http.post(TEXT, content=json.dumps({"prompt": "x y " * 1_250_000})),
        400,
        "maximum context length",
    )


def test_other_paths_and_methods(demo: Served) -> None:
    assert_error(demo.http.get("/v1/nothing"), 404)
    assert_error(demo.http.get(TEXT), 405)
    assert_error(demo.http.get("/v1/models/other"), 404)
    assert_error(demo.http.get("/admin/cluster"), 401)
    assert_error(demo.http.post("/admin/drain", headers={"Authorization": "Bearer wrong"}), 401)
    assert_error(demo.http.post("/detokenize", json={"tokens": [VOCAB_SIZE]}), 400)
    assert_error(demo.http.post("/tokenize", json={"tokens": [5]}), 400)


def test_the_edges_of_what_is_allowed_are_served(demo: Served) -> None:
    """Every field at its limit, one step from what the tests above see refused."""
    assert demo.ask(prompt=[9] * (MAX_LEN - 1), max_tokens=1).usage["total_tokens"] == MAX_LEN
    assert demo.ask(prompt=[0, EOS, VOCAB_SIZE - 1], max_tokens=1).usage["prompt_tokens"] == 3
    assert (
        demo.ask(prompt="x", max_tokens=3, temperature=2.0, top_p=1e-9, min_p=1.0, top_k=2**31 - 1).status
        == 200
    )
    assert (
        demo.ask(
            prompt="x", max_tokens=3, temperature=1e-300, presence_penalty=-2.0, frequency_penalty=2.0
        ).status
        == 200
    )
    assert demo.ask(prompt="x", max_tokens=3, seed=-(2**63), repetition_penalty=1000.0).status == 200
    assert (
        demo.ask(
            prompt="x", max_tokens=3, logit_bias={str(token): -100.0 for token in range(VOCAB_SIZE)}
        ).status
        == 200
    )
    assert demo.ask(prompt="x", max_tokens=1, n=128).usage["completion_tokens"] == 128
    assert (
        demo.ask(prompt="x" * 4000 + "\x00é漢\U0001f600", max_tokens=1, stop=["\x00", "漢", "😀", "é"]).status
        == 200
    )
    assert (
        demo.ask(prompt=[[5 + index] for index in range(64)], max_tokens=1, n=2).usage["prompt_tokens"] == 64
    )


def test_bad_and_good_together(demo: Served, good: list[int]) -> None:
    asks = []
    for index in range(200):
        path, body, _, _, _ = REFUSED[index % len(REFUSED)]
        asks += [Ask(body, path), Ask(GOOD | {"cache_salt": str(index)})]
    answers = demo.together(asks)
    for index, (bad, fine) in enumerate(zip(answers[::2], answers[1::2], strict=True)):
        assert bad.status == REFUSED[index % len(REFUSED)][2]
        assert fine.tokens == good
    demo.assert_clean()
