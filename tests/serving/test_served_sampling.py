"""Sampling fields of a served model: each changes tokens and documents as it should, and nothing
else.
"""

from __future__ import annotations

import math
import random
from itertools import pairwise
from typing import Any

import pytest

from support.serving.mixed_asks import TOP_K, Oracle, random_bodies, random_prompt
from support.serving.served import EOS, Answer, Ask, Body, Served

CHAT = "/v1/chat/completions"
USER: list[Body] = [{"role": "user", "content": "Hello, how are you?"}]
GREEDY: Body = {"temperature": 0.0, "ignore_eos": True, "return_token_ids": True}
SEEDED: Body = {"temperature": 1.0, "top_k": TOP_K, "ignore_eos": True, "return_token_ids": True}


def choices(answer: Answer) -> list[Body]:
    return list(answer.document["choices"])


# --------------------------------------------------------------------------- draws


def test_tokens_are_those_of_the_reference(demo: Served, oracle: Oracle) -> None:
    """Greedy and seeded, against transformers; the seeded ones through the same draws."""
    known = oracle.know(demo, random_bodies(random.Random(41), 48, (1, 200)), 48)
    assert sum(len(each.tokens) for each in known) > 0.8 * 48 * len(known)


def test_seeds_reproduce(demo: Served) -> None:
    prompt = random_prompt(random.Random(42), 20, 20)
    first, again, other = (
        demo.ask(prompt=prompt, seed=seed, max_tokens=24, **SEEDED).tokens for seed in (7, 7, 8)
    )
    assert first == again
    assert first != other
    free = [demo.ask(prompt=prompt, max_tokens=24, **SEEDED).tokens for _ in range(3)]
    assert free[0] != free[1] != free[2], "without a seed every answer is another"


def test_n_choices_are_n_seeds(demo: Served) -> None:
    prompt = random_prompt(random.Random(43), 20, 20)
    whole = demo.ask(prompt=prompt, seed=100, n=4, max_tokens=12, **SEEDED)
    alone = [demo.ask(prompt=prompt, seed=100 + index, max_tokens=12, **SEEDED).tokens for index in range(4)]
    assert [choice["token_ids"] for choice in choices(whole)] == alone
    assert [choice["index"] for choice in choices(whole)] == [0, 1, 2, 3]
    assert whole.usage["prompt_tokens"] == 20
    assert whole.usage["completion_tokens"] == 48


def test_greedy_choices_are_equal_and_prompts_stay_in_order(demo: Served) -> None:
    prompts = [random_prompt(random.Random(44 + index), 10, 30) for index in range(5)]
    whole = demo.ask(prompt=prompts, n=2, max_tokens=6, **GREEDY)
    alone = [demo.ask(prompt=prompt, max_tokens=6, **GREEDY).tokens for prompt in prompts]
    assert [choice["token_ids"] for choice in choices(whole)] == [
        tokens for tokens in alone for _ in range(2)
    ]
    assert [choice["prompt_token_ids"] for choice in choices(whole)] == [
        prompt for prompt in prompts for _ in range(2)
    ]
    assert whole.usage["prompt_tokens"] == sum(map(len, prompts))


@pytest.mark.parametrize("only", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}], ids=str)
def test_filters_that_leave_one_token_are_greedy(demo: Served, only: Body) -> None:
    prompt = random_prompt(random.Random(45), 20, 20)
    greedy = demo.ask(prompt=prompt, max_tokens=16, **GREEDY).tokens
    hot = {"temperature": 2.0, "seed": 3, "ignore_eos": True, "return_token_ids": True}
    assert demo.ask(prompt=prompt, max_tokens=16, **hot, **only).tokens == greedy
    assert demo.ask(prompt=prompt, max_tokens=16, **hot).tokens != greedy


def test_top_k_and_top_p_keep_only_the_likeliest(demo: Served) -> None:
    prompt = random_prompt(random.Random(46), 20, 20)
    shown = choices(
        demo.ask(prompt=prompt, n=100, seed=5, max_tokens=1, temperature=2.0, top_k=5, return_token_ids=True)
    )
    kept = {choice["token_ids"][0] for choice in shown}
    assert 2 <= len(kept) <= 5
    assert (
        len(
            {
                c["token_ids"][0]
                for c in choices(demo.ask(prompt=prompt, n=100, seed=5, max_tokens=1, return_token_ids=True))
            }
        )
        > 5
    )


# --------------------------------------------------------------------------- penalties and biases


def test_a_bias_forces_and_forbids(demo: Served) -> None:
    prompt = random_prompt(random.Random(47), 20, 20)
    [plain] = demo.ask(prompt=prompt, max_tokens=1, **GREEDY).tokens
    assert demo.ask(prompt=prompt, max_tokens=8, logit_bias={"77": 100.0}, **GREEDY).tokens == [77] * 8
    assert demo.ask(prompt=prompt, max_tokens=1, logit_bias={str(plain): -100.0}, **GREEDY).tokens != [plain]
    assert demo.ask(prompt=prompt, max_tokens=1, logit_bias={str(plain): 0.0}, **GREEDY).tokens == [plain]


def test_penalties(demo: Served) -> None:
    """A bias makes the model repeat one token until a penalty has taken it away."""
    prompt, forced = random_prompt(random.Random(48), 20, 20), {"logit_bias": {"77": 20.0}}

    def tokens(**fields: Any) -> list[int]:
        return demo.ask(prompt=prompt, max_tokens=24, **forced, **GREEDY, **fields).tokens

    assert tokens() == [77] * 24
    frequent = tokens(frequency_penalty=2.0)
    assert 5 < frequent.count(77) < 24, "20 of bias last for about ten times 2"
    assert frequent[:5] == [77] * 5
    assert tokens(presence_penalty=2.0) == [77] * 24, "taken once, not per occurrence"
    assert len(set(tokens(repetition_penalty=1000.0))) > 20
    assert tokens(frequency_penalty=-2.0) == [77] * 24


def test_a_presence_penalty_counts_output_and_a_repetition_penalty_the_prompt_too(demo: Served) -> None:
    dice = random.Random(49)
    prompts = [random_prompt(dice, 4, 4) for _ in range(12)]
    plain = demo.ask(prompt=prompts, max_tokens=24, **GREEDY)
    present = demo.ask(prompt=prompts, max_tokens=24, presence_penalty=2.0, **GREEDY)
    distinct = [
        sum(len(set(choice["token_ids"])) for choice in choices(answer)) for answer in (plain, present)
    ]
    assert distinct[0] < distinct[1]
    assert all(
        a["token_ids"][0] == b["token_ids"][0] for a, b in zip(choices(plain), choices(present), strict=True)
    )
    best = choices(plain)[0]["token_ids"][0]
    seen = [best, *prompts[0]]
    again = demo.ask(prompt=seen, max_tokens=1, logit_bias={str(best): 5.0}, **GREEDY).tokens
    penalised = demo.ask(
        prompt=seen, max_tokens=1, logit_bias={str(best): 5.0}, repetition_penalty=1000.0, **GREEDY
    ).tokens
    untouched = demo.ask(
        prompt=seen,
        max_tokens=1,
        logit_bias={str(best): 5.0},
        presence_penalty=2.0,
        frequency_penalty=2.0,
        **GREEDY,
    )
    assert untouched.tokens == again
    assert best not in penalised


# --------------------------------------------------------------------------- ends


def test_ends_of_sequence(demo: Served) -> None:
    prompt, forced = (
        random_prompt(random.Random(50), 20, 20),
        {"logit_bias": {str(EOS): 100.0}, "return_token_ids": True},
    )
    ended = demo.ask(prompt=prompt, max_tokens=9, temperature=0.0, **forced)
    assert (ended.finish, ended.text, choices(ended)[0]["stop_reason"]) == ("stop", "", None)
    assert ended.tokens in ([], [EOS])
    assert ended.usage["completion_tokens"] == 1
    ignored = demo.ask(prompt=prompt, max_tokens=9, temperature=0.0, ignore_eos=True, **forced)
    assert (ignored.finish, ignored.tokens, ignored.usage["completion_tokens"]) == ("length", [EOS] * 9, 9)
    late = demo.ask(prompt=prompt, max_tokens=9, temperature=0.0, min_tokens=5, **forced)
    assert late.finish == "stop"
    assert late.usage["completion_tokens"] == 6
    assert EOS not in late.tokens[:5]


def test_stop_token_ids(demo: Served) -> None:
    prompt = random_prompt(random.Random(51), 20, 20)
    tokens = demo.ask(prompt=prompt, max_tokens=20, **GREEDY).tokens
    at = next(index for index in range(5, 20) if tokens[index] not in tokens[:index])
    stopped = demo.ask(prompt=prompt, max_tokens=20, stop_token_ids=[tokens[at]], **GREEDY)
    assert (stopped.finish, choices(stopped)[0]["stop_reason"]) == ("stop", tokens[at])
    assert stopped.tokens == tokens[: at + 1]
    assert stopped.text == demo.http.post("/detokenize", json={"tokens": tokens[:at]}).json()["prompt"]
    assert stopped.usage["completion_tokens"] == at + 1


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_stop_strings(demo: Served, stream: bool) -> None:
    """A string that lies across tokens, somewhere in the text; nothing of it leaks."""
    text = demo.ask(CHAT, messages=USER, max_tokens=40, **GREEDY).text
    at = next(
        at
        for at in range(12, len(text))
        if text.find(text[at : at + 5]) == at and "\ufffd" not in text[at : at + 5]
    )
    stop = text[at : at + 5]
    fields: Body = {"messages": USER, "max_tokens": 40, "stream": stream, **GREEDY}
    cut = demo.ask(CHAT, stop=["never in it", stop], **fields)
    kept = demo.ask(CHAT, stop=stop, include_stop_str_in_output=True, **fields)
    assert (cut.text, cut.finish) == (text[:at], "stop")
    assert (kept.text, kept.finish) == (text[: at + 5], "stop")
    assert stream or choices(cut)[0]["stop_reason"] == stop
    assert len(cut.tokens) < 40
    demo.assert_clean()


# --------------------------------------------------------------------------- what is shown


def test_logprobs_are_a_distribution_and_agree_everywhere(demo: Served) -> None:
    ids = demo.http.post("/tokenize", json={"messages": USER}).json()["tokens"]
    chat = demo.ask(CHAT, messages=USER, max_tokens=16, logprobs=True, top_logprobs=20, **GREEDY)
    text = demo.ask(prompt=ids, max_tokens=16, logprobs=3, **GREEDY)
    assert chat.tokens == text.tokens
    entries = choices(chat)[0]["logprobs"]["content"]
    assert len(entries) == 16
    for entry, chosen in zip(entries, choices(text)[0]["logprobs"]["token_logprobs"], strict=True):
        tops = [top["logprob"] for top in entry["top_logprobs"]]
        assert tops == sorted(tops, reverse=True)
        assert len(tops) == 20
        assert entry["logprob"] == tops[0], "greedy takes the best"
        assert 0 < sum(map(math.exp, tops)) <= 1.0 + 1e-5
        assert entry["logprob"] == pytest.approx(chosen, abs=1e-4)
        assert bytes(entry["bytes"]).decode("utf-8", "replace") == entry["token"]
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode("utf-8", "replace") == chat.text


def test_logprobs_are_those_of_the_model_whatever_is_sampled(demo: Served) -> None:
    prompt = random_prompt(random.Random(52), 20, 20)
    plain = demo.ask(prompt=prompt, max_tokens=1, logprobs=1, **GREEDY)
    other = demo.ask(
        prompt=prompt,
        max_tokens=1,
        logprobs=1,
        temperature=2.0,
        seed=1,
        logit_bias={str(plain.tokens[0]): 100.0},
    )
    one, two = (choices(answer)[0]["logprobs"]["token_logprobs"][0] for answer in (plain, other))
    assert one == pytest.approx(two, abs=1e-4)


@pytest.mark.parametrize("path", ["/v1/completions", CHAT])
@pytest.mark.parametrize("extra", [{}, {"logprobs": 1}, {"n": 3}, {"stream_interval": 4}], ids=str)
def test_a_stream_joined_is_the_whole(demo: Served, path: str, extra: Body) -> None:
    fields = {**SEEDED, "seed": 11, "max_tokens": 40} | extra
    if path == CHAT:
        fields |= {"messages": USER} | ({"logprobs": True, "top_logprobs": 1} if "logprobs" in extra else {})
    else:
        fields |= {"prompt": "Hello, how are you?"}
    whole = demo.ask(path, **fields)
    stream = demo.ask(
        path, stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True}, **fields
    )
    num = fields.get("n", 1)
    for index in range(num):
        parts = [choice for chunk in stream.chunks for choice in chunk["choices"] if choice["index"] == index]
        expected = choices(whole)[index]
        deltas = [part["text"] if "text" in part else part["delta"].get("content") or "" for part in parts]
        assert "".join(deltas) == (expected["text"] if "text" in expected else expected["message"]["content"])
        assert [token for part in parts for token in part.get("token_ids", [])] == expected["token_ids"]
        assert [part["finish_reason"] for part in parts if part["finish_reason"]] == ["length"]
        assert parts[-1]["finish_reason"] == "length"
        if "logprobs" in extra:
            assert _logprobs(parts) == pytest.approx(_logprobs([expected]), abs=1e-4)
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert stream.usage[name] == whole.usage[name]
    assert whole.usage["completion_tokens"] == 40 * num
    assert stream.chunks[-1]["choices"] == []
    shown = [chunk["usage"]["completion_tokens"] for chunk in stream.chunks if chunk["choices"]]
    assert all(later >= sooner for sooner, later in pairwise(shown)) or num > 1
    assert stream.done


def test_text_and_ids_agree(demo: Served) -> None:
    text = "The controller plans every step: naïve café, 漢字, 😀!"
    ids = demo.http.post("/tokenize", json={"prompt": text}).json()["tokens"]
    by_text, by_ids = (demo.ask(prompt=prompt, max_tokens=20, **GREEDY) for prompt in (text, ids))
    assert by_text.tokens == by_ids.tokens
    assert (
        by_text.text
        == by_ids.text
        == demo.http.post("/detokenize", json={"tokens": by_ids.tokens}).json()["prompt"]
    )
    assert choices(by_text)[0]["prompt_token_ids"] == ids
    assert by_text.usage["prompt_tokens"] == len(ids)
    echoed = demo.ask(prompt=text, max_tokens=20, echo=True, **GREEDY)
    assert echoed.text == text + by_text.text
    assert demo.ask(prompt=text, max_tokens=0, echo=True).text == text


def test_draws_do_not_depend_on_the_company(demo: Served, oracle: Oracle) -> None:
    """The same requests in three different crowds."""
    dice = random.Random(53)
    known = oracle.know(demo, random_bodies(dice, 24, (1, 60)), 32)
    for crowd in range(3):
        dice.shuffle(known)
        noise = [
            Ask({"prompt": random_prompt(dice, 1, 300), "max_tokens": dice.randint(1, 40)}) for _ in range(40)
        ]
        answers = demo.ok([each.ask(32, cache_salt=f"crowd {crowd}") for each in known] + noise)
        for each, answer in zip(known, answers, strict=False):
            each.assert_same(answer, f"crowd {crowd}")


def _logprobs(parts: list[Body]) -> list[float]:
    shown = [part["logprobs"] for part in parts if part["logprobs"]]
    return [
        value
        for each in shown
        for value in each.get("token_logprobs") or [entry["logprob"] for entry in each["content"]]
    ]
