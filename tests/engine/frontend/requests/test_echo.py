"""Prompts shown with their log-probabilities, through the official client and without HTTP."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from lockstep.engine.frontend.requests.echo import Echo
from lockstep.engine.frontend.requests.prompt_scores import PromptScores
from lockstep.engine.protocol.frontends import Submit
from lockstep.engine.protocol.message import Sampling
from lockstep.engine.text.tokenizer import Codec
from support.engine.frontend.running_frontend import MODEL, RunningFrontend
from support.engine.frontend.scripted_controller import prompt_logprobs, say
from support.engine.text.tiny_tokenizer import IM_END, tiny_tokenizer, write_model

PROMPT = "The lazy 東京 dog 🙂 naïve"
PROMPT_IDS = tiny_tokenizer().encode(PROMPT).ids
IDS = tiny_tokenizer().encode(" quick brown").ids


@pytest.fixture(scope="module")
def frontend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningFrontend]:
    with RunningFrontend(write_model(tmp_path_factory.mktemp("model")), say([*IDS, IM_END])) as running:
        yield running


@pytest.fixture
def client(frontend: RunningFrontend) -> Iterator[openai.OpenAI]:
    frontend.engine.submits.clear()
    with openai.OpenAI(base_url=f"{frontend.url}/v1", api_key="none", max_retries=0, timeout=20) as client:
        yield client


def ask(client: openai.OpenAI, stream: bool, **options: Any) -> tuple[str, dict[str, list[Any]], str, Any]:
    """Text, log-probabilities, finish reason and usage of one choice."""
    options = {"model": MODEL, "prompt": PROMPT, "echo": True, "logprobs": 2} | options
    if not stream:
        whole = client.completions.create(**options)
        [choice] = whole.choices
        return choice.text, choice.logprobs.model_dump(), choice.finish_reason, whole.usage
    chunks = list(client.completions.create(stream=True, stream_options={"include_usage": True}, **options))
    parts = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert parts[0].text.startswith(PROMPT) and len(parts[0].logprobs.tokens) >= len(PROMPT_IDS)
    shown = [part.logprobs.model_dump() for part in parts]
    joined = {name: [value for each in shown for value in each[name]] for name in shown[0]}
    return "".join(part.text for part in parts), joined, parts[-1].finish_reason, chunks[-1].usage


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 1, 50])
def test_a_prompt_with_its_logprobs(
    client: openai.OpenAI, frontend: RunningFrontend, stream: bool, max_tokens: int
) -> None:
    text, shown, finish, usage = ask(client, stream, max_tokens=max_tokens)
    num_new = min(max_tokens, len(IDS) + 1)
    assert text == PROMPT + tiny_tokenizer().decode(IDS[:max_tokens])
    assert finish == ("stop" if max_tokens == 50 else "length")
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(PROMPT_IDS), num_new)
    assert {len(values) for values in shown.values()} == {len(PROMPT_IDS) + num_new}
    values = shown["token_logprobs"]
    assert values[: len(PROMPT_IDS)] == [None, *(-at / 8 for at in range(1, len(PROMPT_IDS)))]
    assert values[len(PROMPT_IDS) :] == [-0.5] * num_new
    tops = shown["top_logprobs"]
    assert tops[0] is None
    assert all(
        1 <= len(top) <= 2 and max(top.values()) == value
        for top, value in zip(tops[1:], values[1:], strict=True)
    )
    [submit] = frontend.engine.submits
    assert submit.sampling.num_prompt_logprobs == submit.sampling.num_logprobs == 2
    assert submit.limit == len(PROMPT_IDS) + max_tokens


def test_offsets_are_places_in_the_text(client: openai.OpenAI) -> None:
    text, shown, *_ = ask(client, False, max_tokens=2)
    offsets = shown["text_offset"]
    assert offsets == sorted(offsets) and offsets[0] == 0
    whole = [at for at, token in enumerate(shown["tokens"][: len(PROMPT_IDS)]) if "\ufffd" not in token]
    assert len(whole) > 5
    assert all(text[offsets[at] :].startswith(shown["tokens"][at]) for at in whole)
    assert offsets[len(PROMPT_IDS)] == len(PROMPT)


def test_several_prompts_as_a_harness_asks_them(client: openai.OpenAI, frontend: RunningFrontend) -> None:
    """Sends token ids, generates one token, and cuts out the log-probabilities of a continuation by
    its number of tokens.
    """
    prompts = [PROMPT_IDS, [5], PROMPT_IDS[:4]]
    done = client.completions.create(
        model=MODEL, prompt=prompts, echo=True, logprobs=1, max_tokens=1, temperature=0.0
    )
    for choice, prompt in zip(done.choices, prompts, strict=True):
        continuation = choice.logprobs.token_logprobs[2:-1]
        assert continuation == [-at / 8 for at in range(2, len(prompt))]
        assert all(
            value == max(top.values())
            for value, top in zip(continuation, choice.logprobs.top_logprobs[2:-1], strict=True)
        )
    assert done.usage.completion_tokens == 3
    alone = client.completions.create(model=MODEL, prompt=[5], echo=True, logprobs=0, max_tokens=0).choices[0]
    assert (alone.logprobs.token_logprobs, alone.logprobs.top_logprobs) == ([None], [None])


def test_choices_each_show_the_prompt(client: openai.OpenAI) -> None:
    done = client.completions.create(model=MODEL, prompt=PROMPT, echo=True, logprobs=0, max_tokens=2, n=3)
    assert [len(choice.logprobs.tokens) for choice in done.choices] == [len(PROMPT_IDS) + 2] * 3
    assert len({choice.text for choice in done.choices}) == 1


def test_what_an_engine_has_lost_is_an_error(
    client: openai.OpenAI, frontend: RunningFrontend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frontend.engine, "_score", lambda running: None)
    with pytest.raises(openai.InternalServerError, match="Log-probabilities of the prompt were lost"):
        ask(client, False, max_tokens=1)


@pytest.mark.parametrize("skip", [False, True])
def test_repeats_change_nothing(tmp_path: Path, skip: bool) -> None:
    codec, prompt = Codec(write_model(tmp_path)), [IM_END, *PROMPT_IDS]
    submit = Submit(1, "r", array("i", prompt).tobytes(), b"", 99, Sampling(num_prompt_logprobs=2))
    text = codec.text(prompt, skip)
    once, often = (Echo(codec, prompt, text, 2, skip) for _ in range(2))
    all_at_once, in_parts = PromptScores(prompt, [once]), PromptScores(prompt, [often])
    for message in prompt_logprobs(submit, 100):
        all_at_once.take(message)
    for message in prompt_logprobs(submit, 2):
        in_parts.take(message)
        for again in prompt_logprobs(submit, 5):
            if again.position <= in_parts.known:
                in_parts.take(again)
    empty: dict[str, Any] = {name: [] for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")}
    assert all_at_once.complete and in_parts.complete
    shown = once.before(empty)
    assert shown == often.before(empty)
    assert once.before(empty) == empty, "shown once"
    assert once.text == ("" if skip else "<|im_end|>") + PROMPT
    assert shown["text_offset"][1] == (0 if skip else len("<|im_end|>"))
