"""Fields and endpoints over real sockets: every bad request gets a clear error, and the server
lives on.
"""

from __future__ import annotations

import json
import socket
import struct
import threading
from array import array
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from lockstep.engine.frontend.api.schemas import ChatRequest, TokenizeChat, TokenizeText
from lockstep.engine.kv.hashing import chain_hashes
from lockstep.engine.protocol.message import Sampling
from lockstep.engine.text.tokenizer import Codec
from support.engine.frontend.running_frontend import MODEL, RunningFrontend, wait_until
from support.engine.frontend.scripted_controller import say
from support.engine.text.tiny_tokenizer import END_OF_TEXT, IM_END, VOCAB_SIZE, tiny_tokenizer, write_model

USER = [{"role": "user", "content": "Hello"}]
WORDS = tiny_tokenizer().encode("The quick brown fox").ids


@pytest.fixture(scope="module")
def frontend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningFrontend]:
    with RunningFrontend(write_model(tmp_path_factory.mktemp("model")), say([*WORDS, IM_END])) as running:
        yield running


@pytest.fixture(autouse=True)
def _clean(frontend: RunningFrontend) -> None:
    frontend.engine.submits.clear()


def chat(frontend: RunningFrontend, **fields: Any) -> Any:
    return frontend.http.post("/v1/chat/completions", json={"messages": USER, **fields})


def sampled(frontend: RunningFrontend, **fields: Any) -> Sampling:
    """The ``Sampling`` that a chat request with ``fields`` is submitted with."""
    answer = chat(frontend, **fields)
    assert answer.status_code == 200, answer.text
    return frontend.engine.submits[-1].sampling


# --------------------------------------------------------------------------- fields that are served


def test_sampling_fields_reach_the_engine(frontend: RunningFrontend) -> None:
    sampling = sampled(
        frontend,
        temperature=0.5,
        top_p=0.8,
        top_k=7,
        min_p=0.1,
        presence_penalty=1.5,
        frequency_penalty=-1.5,
        repetition_penalty=1.2,
        seed=-1,
        min_tokens=2,
        logit_bias={"9": 5, "3": -100},
        stop_token_ids=[11],
        user="someone",
        an_unknown_field={"is": "fine"},
    )
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.8, 7, 0.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (
        1.5,
        -1.5,
        1.2,
    )
    assert (sampling.seed, sampling.min_tokens, sampling.num_logprobs) == (2**63 - 1, 2, -1)
    assert list(array("i", sampling.bias_ids_i32)) == [3, 9]
    assert struct.unpack("<2f", sampling.bias_values_f32) == (-100, 5)
    assert list(array("i", sampling.stop_i32)) == [END_OF_TEXT, IM_END, 11]


def test_what_is_left_open_comes_from_generation_config(frontend: RunningFrontend) -> None:
    sampling = sampled(frontend)
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.7, 0.9, 0)
    assert list(array("i", sampling.stop_i32)) == [END_OF_TEXT, IM_END]


def test_ignore_eos_leaves_only_the_clients_stop_ids(frontend: RunningFrontend) -> None:
    assert sampled(frontend, ignore_eos=True, max_tokens=3).stop_i32 == b""
    assert list(
        array("i", sampled(frontend, ignore_eos=True, stop_token_ids=[11], max_tokens=3).stop_i32)
    ) == [11]


def test_extreme_values_are_made_harmless(frontend: RunningFrontend) -> None:
    assert sampled(frontend, temperature=1e-9).temperature == 0.01
    assert sampled(frontend, temperature=0).temperature == 0
    assert sampled(frontend, top_k=-1).top_k == 0
    assert sampled(frontend, top_k=10**6).top_k == 0


def test_a_grammar_reaches_the_engine(frontend: RunningFrontend) -> None:
    assert chat(frontend, response_format={"type": "json_object"}).status_code == 200
    assert "%json" in frontend.engine.submits[-1].grammar
    frontend.http.post(
        "/v1/completions", json={"prompt": ["a", "b"], "structured_outputs": {"choice": ["x"]}}
    )
    assert [submit.grammar for submit in frontend.engine.submits[-2:]] == ['start: (("x"))'] * 2
    chat(frontend)
    assert frontend.engine.submits[-1].grammar == ""


def test_limits(frontend: RunningFrontend) -> None:
    chat(frontend)
    prompt = len(frontend.engine.submits[-1].prompt_i32) // 4
    assert frontend.engine.submits[-1].limit == 512, "what fits"
    chat(frontend, max_tokens=5)
    assert frontend.engine.submits[-1].limit == prompt + 5
    chat(frontend, max_tokens=5, max_completion_tokens=6)
    assert frontend.engine.submits[-1].limit == prompt + 6
    assert chat(frontend, max_tokens=512 - prompt).status_code == 200
    assert chat(frontend, max_tokens=513 - prompt).status_code == 400


def test_prompt_hashes_depend_on_the_salt(frontend: RunningFrontend) -> None:
    hashes = []
    for salt in (None, None, "mine"):
        frontend.http.post("/v1/completions", json={"prompt": list(range(3, 53)), "cache_salt": salt})
        submit = frontend.engine.submits[-1]
        assert submit.hashes_h128 == chain_hashes(submit.hashes_h128[:16], submit.prompt_i32, 16)
        assert len(submit.hashes_h128) == 16 * (1 + 50 // 16)
        hashes.append(submit.hashes_h128)
    assert hashes[0] == hashes[1]
    assert hashes[0][:16] != hashes[2][:16]


def test_no_hashes_without_prefix_caching(frontend: RunningFrontend) -> None:
    def hashes() -> bytes:
        assert chat(frontend).status_code == 200
        return frontend.engine.submits[-1].hashes_h128

    frontend.engine.set_state(prefix_caching=False)
    try:
        wait_until(lambda: hashes() == b"", "requests without hashes")
        assert hashes() == b""
    finally:
        frontend.engine.set_state(prefix_caching=True)
    wait_until(lambda: hashes() != b"", "requests with hashes again")


def test_messages(frontend: RunningFrontend) -> None:
    def prompt(messages: list[Any], **fields: Any) -> str:
        answer = chat(frontend, messages=messages, **fields)
        assert answer.status_code == 200, answer.text
        ids = list(array("i", frontend.engine.submits[-1].prompt_i32))
        return tiny_tokenizer().decode(ids, skip_special_tokens=False)

    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert prompt([{"role": "user", "content": parts}]).startswith("<|im_start|>user\na\nb<|im_end|>")
    assert prompt(USER, chat_template_kwargs={"loud": True}).endswith("LOUD")
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    assert "<|im_start|>tool\n3" in prompt(
        [
            *USER,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "3", "tool_call_id": "1"},
        ]
    )
    continued = prompt(
        [*USER, {"role": "assistant", "content": "So"}],
        continue_final_message=True,
        add_generation_prompt=False,
    )
    assert continued.endswith("assistant\nSo")


def test_the_request_id_is_echoed_or_made(frontend: RunningFrontend) -> None:
    for stream in (False, True):
        answer = frontend.http.post(
            "/v1/chat/completions",
            json={"messages": USER, "stream": stream},
            headers={"X-Request-Id": "abc-1"},
        )
        assert answer.headers.get_list("x-request-id") == ["abc-1"]
        assert '"id":"chatcmpl-abc-1"' in answer.text
    made = chat(frontend, n=1).headers["x-request-id"]
    assert len(made) == 32
    refused = frontend.http.get("/health", headers={"X-Request-Id": 'bad"\tid'}).headers["x-request-id"]
    assert len(refused) == 32


# --------------------------------------------------------------------------- the other endpoints


def test_tokenize_and_detokenize(frontend: RunningFrontend) -> None:
    answer = frontend.http.post("/tokenize", json={"prompt": "The quick", "return_token_strs": True}).json()
    ids = tiny_tokenizer().encode("The quick").ids
    assert (answer["tokens"], answer["count"], answer["max_model_len"]) == (ids, len(ids), 512)
    assert answer["token_strs"] == [tiny_tokenizer().id_to_token(token) for token in ids]
    assert frontend.http.post("/detokenize", json={"tokens": ids}).json() == {"prompt": "The quick"}
    messages = frontend.http.post("/tokenize", json={"messages": USER}).json()["tokens"]
    assert tiny_tokenizer().decode(messages, skip_special_tokens=False).startswith("<|im_start|>user\nHello")
    info = frontend.http.get("/tokenizer_info").json()
    assert info["eos_token_id"] == IM_END
    assert info["byte_level"] is True


def test_status_endpoints(frontend: RunningFrontend) -> None:
    assert frontend.http.get("/health").json() == {"status": "ok"}
    assert frontend.http.get("/ready").status_code == 200
    assert frontend.http.get("/version").json()["version"]
    wait_until(lambda: frontend.http.get("/load").json()["server_load"] == 0, "no request is open")
    assert frontend.http.get("/health/generate").json()["status"] == "ok"
    assert len(frontend.engine.submits) == 1


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_head_is_answered_like_get_without_the_body(frontend: RunningFrontend, path: str) -> None:
    try:
        for phase, status in (("serving", 200), ("failed", 503)):
            frontend.engine.set_state(phase=phase)
            wait_until(
                lambda status=status: frontend.http.head(path).status_code == status,
                f"HEAD {path} shows {phase}",
            )
            head, get = frontend.http.head(path), frontend.http.get(path)
            assert (head.status_code, head.content) == (get.status_code, b"")
            differing = ("date", "x-request-id")
            assert [item for item in head.headers.items() if item[0] not in differing] == [
                item for item in get.headers.items() if item[0] not in differing
            ]
    finally:
        frontend.engine.set_state(phase="serving")
    wait_until(lambda: frontend.http.get("/ready").status_code == 200, "/ready shows serving")


def test_openapi_describes_the_bodies(frontend: RunningFrontend) -> None:
    document = frontend.http.get("/openapi.json").json()
    body = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"][
        "schema"
    ]
    assert body == {"$ref": "#/components/schemas/ChatRequest"}
    assert "temperature" in document["components"]["schemas"]["ChatRequest"]["properties"]


# --------------------------------------------------------------------------- bad input

TOOL = {"type": "function", "function": {"name": "f"}}
BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"messages": 5}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": ["hello"]}, "messages[0]"),
    ({"messages": [{"content": "no role"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": "ten"}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"max_completion_tokens": -5}, "max_completion_tokens"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
    ({"n": 0}, "n"),
    ({"n": 100000}, "n"),
    ({"seed": 2**63}, "seed"),
    ({"seed": "x"}, "seed"),
    ({"stop": 5}, "stop"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a"] * 1025}, "stop"),
    ({"stop": ["a" * 1000] * 17}, "stop"),
    ({"stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {str(VOCAB_SIZE): 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"logit_bias": {str(token): 1 for token in range(5000)}}, "logit_bias"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": []}}}},
        "response_format",
    ),
    ({"response_format": "json"}, "response_format"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
    ({"structured_outputs": {"structural_tag": "a"}}, "structured_outputs"),
    ({"guided_json": {}}, "guided_json"),
    ({"guided_choice": ["a"]}, "guided_choice"),
    ({"best_of": 2}, "best_of"),
    ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ({"prompt_logprobs": -1}, "prompt_logprobs"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
    ({"allowed_token_ids": []}, "allowed_token_ids"),
    ({"allowed_token_ids": [VOCAB_SIZE]}, "allowed_token_ids"),
    ({"allowed_token_ids": [5], "response_format": {"type": "json_object"}}, "allowed_token_ids"),
    ({"allowed_token_ids": [IM_END], "min_tokens": 1}, "allowed_token_ids"),
    ({"bad_words": [""]}, "bad_words"),
    ({"bad_words": "a"}, "bad_words"),
    ({"bad_words": ["a"], "structured_outputs": {"choice": ["b"]}}, "bad_words"),
    ({"bad_words": ["a" * 200 + str(n) for n in range(300)]}, "bad_words"),
    ({"chat_template": "{{ x }}"}, "chat_template"),
    ({"include_reasoning": "no"}, "include_reasoning"),
    ({"tools": [{"type": "function", "function": {"description": "nameless"}}]}, "tools[0].function.name"),
    ({"tools": [{"type": "search"}]}, "tools[0]"),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": "x"}}]},
        "tools[0].function.parameters",
    ),
    ({"tools": [TOOL, TOOL]}, "tools"),
    ({"tools": [TOOL], "tool_choice": "always"}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
    ({"parallel_tool_calls": 1}, "parallel_tool_calls"),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]},
        "messages[0].tool_calls[0].function",
    ),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 1}}]}]},
        "messages",
    ),
    ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
    ({"max_tokens": 600}, "max_tokens"),
    ({"messages": [{"role": "user", "content": "word " * 3000}]}, "messages"),
]


@pytest.mark.parametrize(
    ("fields", "param"), BAD_FIELDS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_bad_chat_fields_are_400_and_name_the_field(
    frontend: RunningFrontend, fields: dict[str, Any], param: str
) -> None:
    answer = chat(frontend, **fields)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("BadRequestError", 400)
    assert error["param"] is not None
    assert error["param"].startswith(param), error
    assert error["message"]
    assert len(error["message"]) < 500
    assert frontend.engine.submits == []
    assert frontend.http.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, "The prompt is empty"),
        ({"prompt": []}, "at least one prompt"),
        ({"prompt": [[]]}, "The prompt is empty"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": [VOCAB_SIZE]}, f"token id {VOCAB_SIZE} is outside the vocabulary"),
        ({"prompt": [-1]}, "token id -1 is outside the vocabulary"),
        ({"prompt": [10**30]}, "a huge number"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens must be at least 1"),
        ({"prompt": "x", "max_tokens": 0, "echo": True, "logprobs": 1, "n": 2}, "n must be 1"),
        (
            {"prompt": [5] * 513, "max_tokens": 0, "echo": True},
            "This model's maximum context length is 512 tokens.",
        ),
        ({"prompt": "x", "suffix": "y"}, "suffix is not supported"),
        ({"prompt": "x", "logprobs": 50}, "logprobs"),
        ({"prompt": ["x"] * 600, "n": 2}, "more than 1024 sequences"),
        ({"prompt": [5] * 511, "max_tokens": 2}, "This model's maximum context length is 512 tokens."),
        ({"prompt": "x", "truncate_prompt_tokens": 513}, "truncate_prompt_tokens"),
    ],
)
def test_bad_completion_fields(frontend: RunningFrontend, fields: dict[str, Any], message: str) -> None:
    answer = frontend.http.post("/v1/completions", json=fields)
    assert answer.status_code == 400, answer.text
    assert message in answer.json()["error"]["message"]
    assert frontend.http.get("/health").status_code == 200


DEEP = b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"{'messages': []}",
        b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": Infinity}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}',
        b'{"messages": [{"role": "user", "content": "x"}], "logit_bias": {"5": -Infinity}}',
        DEEP,
    ],
    ids=lambda body: repr(body[:60]),
)
def test_bad_bodies_are_400(frontend: RunningFrontend, body: bytes) -> None:
    answer = frontend.http.post(
        "/v1/chat/completions", content=body, headers={"content-type": "application/json"}
    )
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["code"] == 400
    assert frontend.http.get("/health").status_code == 200


def test_a_body_that_is_too_large_is_413(frontend: RunningFrontend) -> None:
    body = json.dumps({"prompt": "x" * frontend.spec.limits.max_body}).encode()
    answer = frontend.http.post("/v1/completions", content=body)
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == 413

    def chunks() -> Iterator[bytes]:
        yield from (body[start : start + 65536] for start in range(0, len(body), 65536))

    assert frontend.http.post("/v1/completions", content=chunks()).status_code == 413
    assert frontend.http.get("/health").status_code == 200


def test_unknown_paths_and_methods_have_the_error_shape(frontend: RunningFrontend) -> None:
    missing = frontend.http.get("/v1/nothing")
    assert (missing.status_code, missing.json()["error"]["type"]) == (404, "NotFoundError")
    wrong = frontend.http.get("/v1/chat/completions")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, 405)
    assert wrong.headers["allow"] == "POST"
    assert frontend.http.get("/v1/models/other").status_code == 404
    assert frontend.http.post("/v1/completions", json={"prompt": "x", "model": "other"}).status_code == 404
    assert frontend.http.post("/detokenize", json={"tokens": [VOCAB_SIZE]}).status_code == 400
    assert frontend.http.post("/tokenize", json={"tokens": 1}).status_code == 400


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        (
            "chat",
            {"messages": [{"role": "user", "content": 5}]},
            "messages[0].content",
            "valid string or a valid array (got 5)",
        ),
        (
            "chat",
            {"messages": [{"role": "user", "content": ["x"]}]},
            "messages[0].content[0]",
            "an object (got 'x')",
        ),
        ("chat", {"messages": None}, "messages", "valid array (got null)"),
        ("chat", {"messages": USER, "stop": ["a", None]}, "stop[1]", "valid string (got null)"),
        ("chat", {"messages": USER, "stop": "a" * 1025}, "stop", "at most 1024 characters (got 'aaa"),
        (
            "chat",
            {"messages": USER, "logprobs": [True, None]},
            "logprobs",
            "valid boolean (got [true, null])",
        ),
        (
            "chat",
            {"messages": USER, "tools": [TOOL], "tool_choice": "always"},
            "tool_choice",
            "'auto' or 'required' or an object",
        ),
        (
            "chat",
            {"messages": USER, "tools": [TOOL], "tool_choice": {"type": "function"}},
            "tool_choice.function",
            "Field required",
        ),
        (
            "chat",
            {"messages": USER, "response_format": {"type": "json_schema"}},
            "response_format.json_schema",
            "_schema is missing",
        ),
        (
            "chat",
            {"messages": USER, "response_format": {"type": "json_schema", "json_schema": {"schema": None}}},
            "response_format.json_schema.schema",
            "an object or a valid boolean (got null)",
        ),
        (
            "chat",
            {"messages": USER, "structured_outputs": {}},
            "structured_outputs",
            "structured_outputs takes exactly one",
        ),
        (
            "chat",
            {"messages": USER, "chat_template_kwargs": {"messages": []}},
            "chat_template_kwargs",
            "messages is a field",
        ),
        (
            "chat",
            {"messages": USER, "chat_template_kwargs": {"tools": []}},
            "chat_template_kwargs",
            "tools is a field",
        ),
        (
            "chat",
            {"messages": USER, "chat_template_kwargs": {"self": 1}},
            "chat_template_kwargs",
            "self is not allowed",
        ),
        ("chat", [1], None, "The body should be an object (got [1])"),
        ("completions", {"prompt": ["a", 1]}, "prompt[1]", "(got 1)"),
        ("completions", {"prompt": 5}, "prompt", "valid string or a valid array (got 5)"),
        ("tokenize", {}, "prompt", "prompt: Field required"),
        ("tokenize", {"prompt": None}, "prompt", "valid string (got null)"),
        ("tokenize", {"messages": [{"content": "x"}]}, "messages[0].role", "Field required"),
        ("tokenize", [], None, "The body should be an object (got [])"),
    ],
)
def test_errors_name_the_field_and_what_is_allowed(
    frontend: RunningFrontend, path: str, body: Any, param: str | None, message: str
) -> None:
    """Errors use the client's words: JSON's null, no name of our types, no member of a union."""
    paths = {"chat": "/v1/chat/completions", "completions": "/v1/completions", "tokenize": "/tokenize"}
    answer = frontend.http.post(paths[path], json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param), error
    assert message in error["message"], error
    assert not any(
        word in error["message"]
        for word in (
            "Tokenize",
            "dict",
            "literal",
            "None",
            "response_format: response",
            "structured_outputs: structured",
        )
    )


def test_null_is_the_same_as_left_out(frontend: RunningFrontend) -> None:
    names = set(ChatRequest.model_fields) - {"messages"}
    call = {"type": "function", "function": {"name": "f", "arguments": None}}
    messages = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "x"},
    ]
    ids = []
    for fields in (dict.fromkeys(names), {}):
        answer = chat(frontend, messages=messages, **fields)
        assert answer.status_code == 200, answer.text
        ids.append(frontend.engine.submits[-1].prompt_i32)
    assert ids[0] == ids[1]
    for body in ({"prompt": "x"}, {"messages": USER}):
        kind = TokenizeText if "prompt" in body else TokenizeChat
        nulls = dict.fromkeys(set(kind.model_fields) - set(body))
        answers = [
            frontend.http.post("/tokenize", json={**nulls, **body}),
            frontend.http.post("/tokenize", json=body),
        ]
        assert answers[0].json() == answers[1].json()
        assert answers[0].status_code == 200


def test_what_is_not_http_has_the_error_shape(frontend: RunningFrontend) -> None:
    host, port = frontend.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as raw:
        raw.sendall(b"hello\r\n\r\n")
        head, _, body = b"".join(iter(lambda: raw.recv(4096), b"")).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert f"content-length: {len(body)}".encode() in head
    assert json.loads(body)["error"]["code"] == 400


def test_garbage_on_the_socket_does_not_hurt(frontend: RunningFrontend) -> None:
    host, port = frontend.url.removeprefix("http://").split(":")
    for garbage in (
        b"\x00\x01\x02\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: 50\r\n\r\nshort",
    ):
        with socket.create_connection((host, int(port)), timeout=30) as raw:
            raw.sendall(garbage)
    assert frontend.http.get("/health").status_code == 200


def test_a_long_prompt_does_not_block_health(
    frontend: RunningFrontend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4 MB of text take far longer to tokenize than a hundred answers of /health, which is asked
    meanwhile.
    """
    text = "The quick brown fox jumps over the lazy dog. " * 90_000
    body = {"prompt": text, "truncate_prompt_tokens": 5, "max_tokens": 1}
    answers: list[Any] = []
    begun, done = threading.Event(), threading.Event()
    encode = Codec.encode

    def watched(*args: Any, **options: Any) -> list[int]:
        begun.set()
        try:
            return encode(*args, **options)
        finally:
            done.set()

    monkeypatch.setattr(Codec, "encode", watched)
    post = partial(frontend.http.post, "/v1/completions", json=body, timeout=90)
    work = threading.Thread(target=lambda: answers.append(post()))
    work.start()
    assert begun.wait(30), "nothing was tokenized"
    meanwhile = 0
    while not done.is_set():
        assert frontend.http.get("/health").status_code == 200
        meanwhile += not done.is_set()
    work.join()
    assert answers[0].status_code == 200
    assert meanwhile > 2, "/health waited for the prompt"


# --------------------------------------------------------------------------- metrics


def test_metrics(frontend: RunningFrontend) -> None:
    chat(frontend)
    chat(frontend, max_tokens=2)
    text = frontend.http.get("/metrics").text
    values = {
        line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1])
        for line in text.splitlines()
        if not line.startswith("#")
    }
    label = f'{{engine="0",model_name="{MODEL}"}}'
    for prefix in ("vllm", "lockstep"):
        assert values[f"{prefix}:kv_cache_usage_perc{label}"] == 0.25
        assert values[f"{prefix}:prompt_tokens_total{label}"] == 10
        assert values[f"{prefix}:time_to_first_token_seconds_count{label}"] >= 2
        assert values[f"{prefix}:inter_token_latency_seconds_count{label}"] >= 2
        reason = f'{{engine="0",finished_reason="length",model_name="{MODEL}"}}'
        assert values[f"{prefix}:request_success_total{reason}"] >= 1
        assert any(name.startswith(f"{prefix}:cache_config_info") for name in values)
    assert values['http_requests_total{handler="/v1/chat/completions",method="POST",status="2xx"}'] >= 2
    buckets = [name for name in values if name.startswith("vllm:time_to_first_token_seconds_bucket")]
    assert len(buckets) == 23
    assert any('le="2560.0"' in name for name in buckets)
