"""The official client against a real frontend process loop and a mock controller."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

import openai
import pytest

from support.engine.frontend.running_frontend import MODEL, RunningFrontend
from support.engine.frontend.scripted_controller import say
from support.engine.text.tiny_tokenizer import IM_END, tiny_tokenizer, write_model

TEXT = "The quick brown fox 東京 🙂 naïve lazy dog."
IDS = tiny_tokenizer().encode(TEXT).ids
USER = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def frontend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningFrontend]:
    with RunningFrontend(write_model(tmp_path_factory.mktemp("model")), say([*IDS, IM_END])) as running:
        yield running


@pytest.fixture
def engine(frontend: RunningFrontend) -> RunningFrontend:
    """The frontend, with its mock controller reset."""
    frontend.engine.script = say([*IDS, IM_END])
    frontend.engine.num_cached = 0
    frontend.engine.submits.clear()
    frontend.engine.aborts.clear()
    return frontend


@pytest.fixture
def client(engine: RunningFrontend) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{engine.url}/v1", api_key="none", max_retries=0, timeout=20) as client:
        yield client


def test_chat(client: openai.OpenAI, engine: RunningFrontend) -> None:
    engine.engine.num_cached = 4
    done = client.chat.completions.create(model=MODEL, messages=USER)
    assert done.choices[0].message.content == TEXT
    assert done.choices[0].finish_reason == "stop"
    prompt = tiny_tokenizer().encode("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n").ids
    assert list(array("i", engine.engine.submits[0].prompt_i32)) == prompt
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (len(prompt), len(IDS) + 1)
    assert done.usage.prompt_tokens_details.cached_tokens == 4


def test_chat_stream_joins_to_the_same_text(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=USER, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].choices[0].delta.content == ""
    assert "".join(chunk.choices[0].delta.content for chunk in chunks[:-1]) == TEXT
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == len(IDS) + 1


@pytest.mark.parametrize("chunk", [1, 2, 3, 50])
@pytest.mark.parametrize("stop", [None, "fox", ["京 ", "zzz"], "🙂 naïve", "dog. and more"])
@pytest.mark.parametrize("include", [False, True])
def test_stream_equals_non_stream_with_stop_strings(
    client: openai.OpenAI, engine: RunningFrontend, chunk: int, stop: str | list[str] | None, include: bool
) -> None:
    tokens = [*IDS, IM_END]
    engine.engine.script = lambda submit: [
        tokens[start : start + chunk] for start in range(0, len(tokens), chunk)
    ]
    options = {
        "model": MODEL,
        "prompt": "x",
        "max_tokens": 100,
        "extra_body": {"include_stop_str_in_output": include},
    }
    if stop is not None:
        options["stop"] = stop
    whole = client.completions.create(**options).choices[0]
    pieces = [part.choices[0] for part in client.completions.create(stream=True, **options)]
    assert "".join(piece.text for piece in pieces) == whole.text
    assert pieces[-1].finish_reason == whole.finish_reason == "stop"
    hit = next((word for word in ([stop] if isinstance(stop, str) else stop or []) if word in TEXT), None)
    expected = TEXT if hit is None else TEXT[: TEXT.index(hit) + (len(hit) if include else 0)]
    assert whole.text == expected


def test_n_choices_have_their_own_seeds_and_share_one_prompt(
    client: openai.OpenAI, engine: RunningFrontend
) -> None:
    done = client.chat.completions.create(model=MODEL, messages=USER, n=3, seed=2**63 - 2)
    assert [choice.index for choice in done.choices] == [0, 1, 2]
    assert [submit.sampling.seed for submit in engine.engine.submits] == [2**63 - 2, 2**63 - 1, 0]
    assert len({submit.request_id for submit in engine.engine.submits}) == 3
    assert done.usage.prompt_tokens * 4 == len(engine.engine.submits[0].prompt_i32)
    assert done.usage.completion_tokens == 3 * (len(IDS) + 1)


def test_unseeded_requests_get_different_recorded_seeds(
    client: openai.OpenAI, engine: RunningFrontend
) -> None:
    for _ in range(2):
        client.chat.completions.create(model=MODEL, messages=USER)
    first, second = (submit.sampling.seed for submit in engine.engine.submits)
    assert first != second
    assert all(0 <= seed < 2**63 for seed in (first, second))


def test_several_choices_in_one_stream(client: openai.OpenAI) -> None:
    texts, reasons = ["", ""], []
    for chunk in client.chat.completions.create(model=MODEL, messages=USER, n=2, stream=True):
        choice = chunk.choices[0]
        texts[choice.index] += choice.delta.content
        reasons += [choice.finish_reason] if choice.finish_reason else []
    assert texts == [TEXT, TEXT]
    assert reasons == ["stop", "stop"]


def test_completion_prompts_as_text_texts_ids_and_id_lists(
    client: openai.OpenAI, engine: RunningFrontend
) -> None:
    for prompt, count in (("The", 1), (["The", "lazy"], 2), ([5, 6, 7], 1), ([[5, 6], [7]], 2)):
        engine.engine.submits.clear()
        done = client.completions.create(model=MODEL, prompt=prompt, max_tokens=2)
        assert [choice.index for choice in done.choices] == list(range(count))
        assert [choice.finish_reason for choice in done.choices] == ["length"] * count
        sent = [list(array("i", submit.prompt_i32)) for submit in engine.engine.submits]
        expected = [
            tiny_tokenizer().encode(item).ids if isinstance(item, str) else item for item in _as_list(prompt)
        ]
        assert sent == expected
        assert done.usage.prompt_tokens == sum(map(len, expected))


def _as_list(prompt: object) -> list[object]:
    if isinstance(prompt, str):
        return [prompt]
    assert isinstance(prompt, list)
    return [prompt] if isinstance(prompt[0], int) else prompt


@pytest.mark.parametrize("stream", [False, True])
def test_echo(client: openai.OpenAI, engine: RunningFrontend, stream: bool) -> None:
    def ask(**options: object) -> str:
        done = client.completions.create(model=MODEL, prompt="The lazy", echo=True, stream=stream, **options)
        return "".join(chunk.choices[0].text for chunk in done) if stream else done.choices[0].text

    assert ask(max_tokens=50) == "The lazy" + TEXT
    engine.engine.submits.clear()
    assert ask(max_tokens=0) == "The lazy"
    assert engine.engine.submits == [], "echo alone needs no engine"


@pytest.mark.parametrize("stream", [False, True])
def test_chat_logprobs(client: openai.OpenAI, stream: bool) -> None:
    options = {"model": MODEL, "messages": USER, "logprobs": True, "top_logprobs": 2}
    if stream:
        chunks = list(client.chat.completions.create(stream=True, **options))
        content = [
            item
            for chunk in chunks
            if chunk.choices[0].logprobs
            for item in chunk.choices[0].logprobs.content
        ]
    else:
        content = client.chat.completions.create(**options).choices[0].logprobs.content
    assert len(content) == len(IDS) + 1, "one entry per token, the stop id's included"
    assert b"".join(bytes(item.bytes) for item in content[:-1]).decode() == TEXT
    assert all(item.logprob == -0.5 for item in content)
    assert [top.logprob for top in content[0].top_logprobs] == [-0.5, -1.5]
    assert content[0].top_logprobs[0].token == content[0].token


@pytest.mark.parametrize("stream", [False, True])
def test_completion_logprobs_of_a_stopped_text_end_with_the_stop(client: openai.OpenAI, stream: bool) -> None:
    options = {"model": MODEL, "prompt": "x", "logprobs": 1, "max_tokens": 50, "stop": " brown"}
    if stream:
        parts = [chunk.choices[0].logprobs for chunk in client.completions.create(stream=True, **options)]
        tokens = [token for part in parts if part for token in part.tokens]
        offsets = [offset for part in parts if part for offset in part.text_offset]
    else:
        found = client.completions.create(**options).choices[0].logprobs
        tokens, offsets = found.tokens, found.text_offset
    assert "".join(tokens).endswith(" brown fox") or "".join(tokens).endswith(" brown")
    assert offsets == [sum(map(len, tokens[:index])) for index in range(len(tokens))]


@pytest.mark.parametrize("stream", [False, True])
def test_return_token_ids(engine: RunningFrontend, stream: bool) -> None:
    body = {"messages": USER, "return_token_ids": True, "stream": stream}
    answer = engine.http.post("/v1/chat/completions", json=body)
    prompt = list(array("i", engine.engine.submits[0].prompt_i32))
    if not stream:
        document = answer.json()
        assert (document["prompt_token_ids"], document["choices"][0]["token_ids"]) == (prompt, [*IDS, IM_END])
        return
    chunks = _frames(answer.text)
    assert chunks[0]["prompt_token_ids"] == prompt
    assert [token for chunk in chunks for token in chunk["choices"][0].get("token_ids", [])] == [*IDS, IM_END]


def test_continuous_usage_counts_up_on_every_chunk(engine: RunningFrontend) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"messages": USER, "stream": True, "stream_options": options}
    chunks = _frames(engine.http.post("/v1/chat/completions", json=body).text)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, len(IDS) + 1)


def test_models_and_errors_through_the_client(client: openai.OpenAI) -> None:
    assert [(model.id, model.max_model_len) for model in client.models.list()] == [(MODEL, 512)]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="other", messages=USER)
    assert missing.value.body["code"] == 404
    assert missing.value.param == "model"
    with pytest.raises(openai.BadRequestError, match="This model's maximum context length is 512 tokens"):
        client.completions.create(model=MODEL, prompt=[5] * 600)


def _frames(text: str) -> list[dict[str, object]]:
    import json

    lines = [line for line in text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
