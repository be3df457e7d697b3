"""Fields and keys that clients rely on: rules about tokens, the prompt's own log-probabilities,
keys that are null where empty, usage.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from lockstep.engine.frontend.requests.logprobs import chat_logprobs, text_logprobs
from lockstep.engine.frontend.requests.places import Places
from lockstep.engine.protocol.frontends import HandleLogprobs, Submit
from lockstep.engine.text.tokenizer import Codec
from support.engine.frontend.running_frontend import MODEL, RunningFrontend
from support.engine.frontend.scripted_controller import say
from support.engine.text.tiny_tokenizer import (
    IM_END,
    TOOL_TEMPLATE,
    VOCAB_SIZE,
    tiny_tokenizer,
    turn_ids,
    write_model,
)

USER = [{"role": "user", "content": "Hello"}]
PROMPT = "The lazy 東京 dog"
PROMPT_IDS = tiny_tokenizer().encode(PROMPT).ids
THOUGHT = "\nSo it is.\n"
TEXT = f"<think>{THOUGHT}</think>\n\nThe quick fox"
WORDS = tiny_tokenizer().encode(TEXT).ids


@pytest.fixture(scope="module")
def frontend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningFrontend]:
    path = write_model(tmp_path_factory.mktemp("model"), template=TOOL_TEMPLATE)
    with RunningFrontend(path, say([*WORDS, IM_END])) as running:
        yield running


@pytest.fixture(autouse=True)
def _clean(frontend: RunningFrontend) -> None:
    frontend.engine.script = say([*WORDS, IM_END])
    frontend.engine.submits.clear()


@pytest.fixture
def client(frontend: RunningFrontend) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{frontend.url}/v1", api_key="none", max_retries=0, timeout=20) as client:
        yield client


def complete(frontend: RunningFrontend, **fields: Any) -> dict[str, Any]:
    answer = frontend.http.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 2, **fields})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def refused(frontend: RunningFrontend, **fields: Any) -> str:
    answer = frontend.http.post("/v1/completions", json={"prompt": PROMPT, **fields})
    assert answer.status_code == 400, answer.text
    message: str = answer.json()["error"]["message"]
    return message


def last(frontend: RunningFrontend) -> Submit:
    return frontend.engine.submits[-1]


# --------------------------------------------------------------------------- the prompt


def assert_ranked(shown: list[Any], num_top: int) -> None:
    assert shown[0] is None and len(shown) == len(PROMPT_IDS)
    codec = tiny_tokenizer()
    for at, (token, entries) in enumerate(zip(PROMPT_IDS[1:], shown[1:], strict=True), start=1):
        assert list(entries) == [str(token + other) for other in range(max(1, num_top))]
        own = entries[str(token)]
        assert (own["logprob"], own["rank"]) == (-at / 8, 1)
        assert own["decoded_token"] == codec.decode([token], skip_special_tokens=False)
        assert [entry["rank"] for entry in entries.values()] == list(range(1, max(1, num_top) + 1))


@pytest.mark.parametrize("num_top", [0, 1, 3, 20])
@pytest.mark.parametrize("extra", [{}, {"echo": True, "logprobs": 2}, {"n": 2}, {"return_token_ids": True}])
def test_prompt_logprobs_have_the_shape_of_vllm(
    frontend: RunningFrontend, num_top: int, extra: dict[str, Any]
) -> None:
    choices = complete(frontend, prompt_logprobs=num_top, **extra)["choices"]
    assert len(choices) == extra.get("n", 1)
    for choice in choices:
        assert_ranked(choice["prompt_logprobs"], num_top)
    asked = [submit.sampling.num_prompt_logprobs for submit in frontend.engine.submits]
    assert asked == [max(num_top, extra.get("logprobs", 0)), -1][: len(choices)], "once for all choices"
    if extra.get("echo"):
        assert len(choices[0]["logprobs"]["tokens"]) == len(PROMPT_IDS) + 2
        assert {len(top) for top in choices[0]["logprobs"]["top_logprobs"][1:]} <= {1, 2}


def test_prompt_logprobs_of_a_chat_and_of_several_prompts(frontend: RunningFrontend) -> None:
    answer = frontend.http.post(
        "/v1/chat/completions", json={"messages": USER, "prompt_logprobs": 1, "return_token_ids": True}
    ).json()
    prompt = list(array("i", last(frontend).prompt_i32))
    assert answer["prompt_token_ids"] == prompt
    shown = answer["prompt_logprobs"]
    assert [entry and list(entry) for entry in shown] == [None, *([str(token)] for token in prompt[1:])]
    several = complete(frontend, prompt=[PROMPT_IDS, [5], PROMPT_IDS[:3]], prompt_logprobs=0, n=2)["choices"]
    assert [len(choice["prompt_logprobs"]) for choice in several] == [len(PROMPT_IDS)] * 2 + [1] * 2 + [3] * 2


def test_a_prompt_is_cut_at_its_start(frontend: RunningFrontend) -> None:
    def cut(**fields: Any) -> list[int]:
        complete(frontend, **fields)
        return list(array("i", last(frontend).prompt_i32))

    assert cut(truncate_prompt_tokens=3) == PROMPT_IDS[-3:]
    assert cut(truncate_prompt_tokens=500) == PROMPT_IDS
    assert cut(truncate_prompt_tokens=None) == PROMPT_IDS
    long = list(range(3, 403)) * 3
    assert cut(prompt=long, truncate_prompt_tokens=-1, max_tokens=12) == long[-500:]
    assert cut(prompt=long, truncate_prompt_tokens=500, max_tokens=12) == long[-500:]
    assert "at most 512" in refused(frontend, truncate_prompt_tokens=513)
    assert "maximum context length" in refused(
        frontend, prompt=long, truncate_prompt_tokens=510, max_tokens=9
    )
    chat = frontend.http.post(
        "/v1/chat/completions", json={"messages": USER, "truncate_prompt_tokens": 2, "max_tokens": 1}
    )
    assert (chat.status_code, chat.json()["usage"]["prompt_tokens"]) == (200, 2)


# --------------------------------------------------------------------------- rules about tokens


def test_allowed_ids_reach_the_engine_as_ranges(frontend: RunningFrontend) -> None:
    complete(frontend, allowed_token_ids=[9, 4, 5, 6, 9, 419])
    assert list(array("i", last(frontend).sampling.allowed_i32)) == [4, 6, 9, 9, 419, 419]
    complete(frontend, allowed_token_ids=list(range(VOCAB_SIZE)))
    assert list(array("i", last(frontend).sampling.allowed_i32)) == [0, VOCAB_SIZE - 1]
    complete(frontend)
    assert last(frontend).sampling.allowed_i32 == b""


def test_bad_words_are_tokens_with_and_without_a_space(frontend: RunningFrontend) -> None:
    def words(given: list[str]) -> list[list[int]]:
        complete(frontend, bad_words=given)
        found: list[list[int]] = [[]]
        for token in array("i", last(frontend).sampling.bad_words_i32):
            found = [*found, []] if token < 0 else [*found[:-1], [*found[-1], token]]
        return found[:-1]

    encode = tiny_tokenizer().encode
    assert words(["fox", " dog", "\n"]) == [
        encode(text).ids for text in ("fox", " fox", "dog", " dog", "\n", " \n")
    ]
    assert words(["fox", "fox"]) == [encode("fox").ids, encode(" fox").ids]
    assert words([]) == []


def test_rules_that_leave_no_token_are_refused(frontend: RunningFrontend) -> None:
    [dog] = tiny_tokenizer().encode(" dog").ids
    assert "together forbid every token" in refused(frontend, allowed_token_ids=[dog], bad_words=["dog"])
    complete(frontend, allowed_token_ids=[dog, 5], bad_words=["dog"])
    assert "separate runs; at most" not in complete(frontend, allowed_token_ids=list(range(0, 400, 2)))


def test_all_bad_keys_are_named_up_to_ten(frontend: RunningFrontend) -> None:
    message = refused(frontend, logit_bias={"x": 1, "5": 1, "-1": 1, "9999": 1, "1.5": 1})
    assert (
        message
        == f"logit_bias: keys must be token ids from 0 to {VOCAB_SIZE - 1} (got 'x', '-1', '9999', '1.5')"
    )
    many = refused(frontend, logit_bias={f"k{number}": 1 for number in range(14)})
    assert many.endswith("'k9' and 4 more)") and "'k10'" not in many
    ids = refused(frontend, allowed_token_ids=[5, 500, 600])
    assert "allowed_token_ids: token ids 500, 600 are outside" in ids
    for field in ("prompt_logprobs", "logprobs"):
        assert "less than or equal to 20 (got 21)" in refused(frontend, **{field: 21})


@pytest.mark.parametrize("stream", [False, True])
def test_many_stop_strings(frontend: RunningFrontend, stream: bool) -> None:
    stops = [f"never {number}" for number in range(1000)] + ["quick"]
    answer = frontend.http.post(
        "/v1/completions", json={"prompt": PROMPT, "max_tokens": 99, "stop": stops, "stream": stream}
    )
    chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    choices = [chunk["choices"][0] for chunk in chunks] or answer.json()["choices"]
    assert "".join(choice["text"] for choice in choices) == TEXT[: TEXT.index("quick")]
    assert choices[-1]["stop_reason"] == "quick"


# --------------------------------------------------------------------------- candidates


def test_candidates_of_equal_text_are_all_there(tmp_path: Path) -> None:
    """Parts of characters look alike; so do an id and another of the same text."""
    codec = Codec(write_model(tmp_path))
    parts = [token for token in range(3, 400) if codec.piece(token)[:1] >= b"\x80"][:4]
    assert {codec.piece(token).decode("utf-8", "replace") for token in parts} == {"\ufffd"}
    ids, values = array("i", parts[:3]).tobytes(), array("f", [-1.0, -2.0, -3.0]).tobytes()
    for chosen, value in ((parts[0], -1.0), (parts[2], -3.0), (parts[3], -22.0)):
        entry = HandleLogprobs(0, 0, value, ids, values)
        shown = text_logprobs(codec, [chosen], [entry], 3, Places(codec, True, []))
        [top] = shown["top_logprobs"]
        assert sorted(top.values()) == sorted({-1.0, -2.0, -3.0, value})
        assert top[shown["tokens"][0]] == shown["token_logprobs"][0] == value
        assert set(top) - {"\ufffd"} == {f"token_id:{token}" for token in parts[:3] if token != chosen}
        [item] = chat_logprobs(codec, [chosen], [entry], 3)["content"]
        assert (item["logprob"], item["bytes"]) == (value, list(codec.piece(chosen)))
        assert [candidate["bytes"] for candidate in item["top_logprobs"]] == [
            list(codec.piece(token)) for token in parts[:3]
        ]


# --------------------------------------------------------------------------- keys and usage


def test_keys_are_null_where_empty(client: openai.OpenAI, frontend: RunningFrontend) -> None:
    frontend.engine.script = say(turn_ids("fox"))
    chat = client.chat.completions.create(model=MODEL, messages=USER)
    message: Any = chat.choices[0].message
    assert message.reasoning is message.reasoning_content is message.refusal is message.function_call is None
    assert not message.tool_calls
    assert chat.prompt_logprobs is chat.prompt_token_ids is chat.choices[0].token_ids is None
    assert chat.system_fingerprint is None and chat.choices[0].stop_reason is None
    text: Any = client.completions.create(model=MODEL, prompt="x").choices[0]
    assert text.prompt_logprobs is text.prompt_token_ids is text.token_ids is text.logprobs is None


@pytest.mark.parametrize("thinking", [None, True, False])
@pytest.mark.parametrize("stop", [None, "quick", "it is"])
def test_reasoning_tokens_are_the_ids_between_the_tags(
    client: openai.OpenAI, frontend: RunningFrontend, thinking: bool | None, stop: str | None
) -> None:
    """The tags are several tokens each; with ``thinking`` the prompt has opened the reasoning."""
    body = TEXT.removeprefix("<think>") if thinking else TEXT if thinking is None else "The quick fox"
    tokens = tiny_tokenizer().encode(body).ids
    frontend.engine.script = say([*tokens, IM_END])
    starts = [len(tiny_tokenizer().decode(tokens[:at])) for at in range(len(tokens))]
    begin = body.index(THOUGHT) if THOUGHT in body else 0
    end = begin + len(THOUGHT) if THOUGHT in body else 0
    used = starts if stop is None or stop not in body else starts[: _completing(tokens, body, stop)]
    expected = sum(begin <= start < end for start in used)
    kwargs = {} if thinking is None else {"chat_template_kwargs": {"enable_thinking": thinking}}
    options: dict[str, Any] = {"model": MODEL, "messages": USER, "stop": stop, "extra_body": kwargs}
    whole = client.chat.completions.create(**options)
    usage = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(client.chat.completions.create(stream=True, stream_options=usage, **options))
    counts = [chunk.usage.completion_tokens_details.reasoning_tokens for chunk in chunks]
    assert whole.usage.completion_tokens_details.reasoning_tokens == counts[-1] == expected
    assert counts[0] == 0
    if THOUGHT in body:
        assert expected > 2


def _completing(tokens: list[int], body: str, stop: str) -> int:
    """The number of tokens up to the one that completes ``stop``."""
    end = body.index(stop) + len(stop)
    return next(n for n in range(len(tokens) + 1) if len(tiny_tokenizer().decode(tokens[:n])) >= end)


@pytest.mark.parametrize(
    ("options", "with_usage"),
    [
        ({"include_usage": False, "continuous_usage_stats": True}, "none"),
        ({"continuous_usage_stats": True}, "none"),
        ({"include_usage": True}, "last"),
        ({"include_usage": True, "continuous_usage_stats": True}, "all"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_usage_in_streams(
    frontend: RunningFrontend, path: str, options: dict[str, bool], with_usage: str
) -> None:
    answer = frontend.http.post(
        path, json={"prompt": "x", "messages": USER, "stream": True, "stream_options": options}
    )
    chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    flags = [chunk.get("usage") is not None for chunk in chunks]
    assert (
        flags
        == {
            "none": [False] * len(flags),
            "last": [False] * (len(flags) - 1) + [True],
            "all": [True] * len(flags),
        }[with_usage]
    )
    assert len(flags) > 3


def test_tokenizer_info_has_the_tokenizers_own_settings(frontend: RunningFrontend) -> None:
    info = frontend.http.get("/tokenizer_info").json()
    assert (info["eos_token"], info["bos_token"]) == ("<|im_end|>", None)
    assert info["special_tokens"] == {"eos_token": "<|im_end|>"}
    assert info["chat_template"] == TOOL_TEMPLATE
    assert info["added_tokens_decoder"]["2"] == "<|im_end|>"


# --------------------------------------------------------------------------- wide tokenizers


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningFrontend]:
    """A tokenizer with two tokens more than the model has logits."""
    path = write_model(tmp_path_factory.mktemp("wide"))
    file = path / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    for id in range(tiny_tokenizer().get_vocab_size(), VOCAB_SIZE + 2):
        added = {**tokenizer["added_tokens"][0], "id": id, "content": f"<|extra_{id - VOCAB_SIZE}|>"}
        tokenizer["added_tokens"].append(added)
    file.write_text(json.dumps(tokenizer))
    with RunningFrontend(path, say([*WORDS, IM_END])) as running:
        yield running


def test_a_token_without_an_embedding_is_refused_by_name(wide: RunningFrontend) -> None:
    for path, body, param in (
        ("/v1/completions", {"prompt": "a <|extra_0|> b"}, "prompt"),
        ("/v1/completions", {"prompt": ["a", "a <|extra_0|> b"]}, "prompt"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "<|extra_0|>"}]}, "messages"),
        ("/v1/completions", {"prompt": "a", "bad_words": ["<|extra_0|>"]}, "bad_words"),
    ):
        answer = wide.http.post(path, json={**body, "max_tokens": 2})
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, param), answer.text
        assert "'<|extra_0|>' (id 420)" in error["message"]
        assert "vocabulary of 420 ids" in error["message"]
    assert complete(wide, prompt="a")["choices"][0]["finish_reason"] == "length"
    assert "token id 420 is outside" in refused(wide, prompt=[5, VOCAB_SIZE])
    choice = complete(wide, structured_outputs={"choice": ["<|extra_0|>"]}, max_tokens=3)
    assert choice["choices"] and f"<[{VOCAB_SIZE}]>" not in last(wide).grammar
