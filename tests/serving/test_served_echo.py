"""Prompts shown with log-probabilities: the model's numbers, whatever happens to the request."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from typing import Any

import openai
import pytest

from support.serving.mixed_asks import Oracle, random_bodies, random_prompt
from support.serving.served import Answer, Ask, Body, Served

SCORED: Body = {"echo": True, "temperature": 0.0, "ignore_eos": True, "return_token_ids": True}


def shown(answer: Answer) -> dict[str, list[Any]]:
    """The log-probabilities of the first choice, joined where they were streamed."""
    documents = [answer.document] if answer.document else answer.chunks
    parts = [choice["logprobs"] for each in documents for choice in each["choices"]]
    return {name: [value for part in parts for value in part[name]] for name in parts[0]}


def scores(answer: Answer, prompt: list[int]) -> list[float]:
    """Log-probabilities of the prompt's tokens but the first. Checks that each list of the answer
    covers all tokens.
    """
    lists = shown(answer)
    assert {len(values) for values in lists.values()} == {len(prompt) + len(answer.tokens)}
    assert lists["token_logprobs"][0] is lists["top_logprobs"][0] is None
    return lists["token_logprobs"][1 : len(prompt)]


def test_numbers_are_those_of_the_reference(demo: Served, oracle: Oracle) -> None:
    """Whole and streamed, with no, one and many tokens after the prompt, beside requests that only
    generate.
    """
    dice = random.Random(61)
    prompts = [random_prompt(dice, 1, 400) for _ in range(16)] + [[7]]
    ways: list[Body] = [
        {"logprobs": index % 6, "max_tokens": (0, 1, 12)[index % 3], "stream": index % 2 == 1}
        for index in range(17)
    ]
    noise = [Ask(body | {"max_tokens": 40}) for body in random_bodies(dice, 24, (1, 200))]
    asks = [Ask({"prompt": prompt, **SCORED, **way}) for prompt, way in zip(prompts, ways, strict=True)]
    answers = demo.ok([each for pair in zip(asks, noise, strict=False) for each in pair])[::2]
    compared = 0
    for prompt, way, answer in zip(prompts, ways, answers, strict=True):
        certain = oracle.score(prompt)
        assert scores(answer, prompt)[: len(certain)] == pytest.approx(certain, abs=1e-3)
        compared += len(certain)
        assert (len(answer.tokens), answer.finish) == (way["max_tokens"], "length")
        tops = shown(answer)["top_logprobs"][1:]
        assert all(len(top) <= way["logprobs"] + 1 for top in tops)
    assert compared > 0.7 * sum(map(len, prompts))
    demo.assert_clean()


def test_usage_and_the_cache(demo: Served) -> None:
    """A scored prompt takes nothing from the cache, gives the same numbers, and adds its pages to
    the cache.
    """
    prompt = random_prompt(random.Random(62), 700, 700)
    first = demo.ask(prompt=prompt, logprobs=3, max_tokens=0, **SCORED)
    plain = demo.ask(prompt=[*prompt, 9], max_tokens=1)
    again = demo.ask(prompt=prompt, logprobs=3, max_tokens=1, **SCORED)
    assert (first.cached, again.cached) == (0, 0) and plain.cached >= 0.9 * len(prompt)
    assert [answer.usage["completion_tokens"] for answer in (first, again)] == [0, 1]
    assert first.usage["total_tokens"] == first.usage["prompt_tokens"] == len(prompt)
    assert scores(again, prompt) == pytest.approx(scores(first, prompt), abs=1e-4)
    assert again.text.startswith(first.text)
    streamed = demo.ask(
        prompt=prompt, logprobs=3, max_tokens=1, stream=True, stream_options={"include_usage": True}, **SCORED
    )
    assert streamed.text == again.text and streamed.usage["completion_tokens"] == 1
    assert len(streamed.chunks[0]["choices"][0]["logprobs"]["tokens"]) >= len(prompt), (
        "the prompt comes with the first chunk"
    )
    assert scores(streamed, prompt) == pytest.approx(scores(first, prompt), abs=1e-4)


def test_the_official_client_judges_continuations(demo: Served, oracle: Oracle) -> None:
    """Requests of evaluation harnesses: they send ids, generate one token, sum over a continuation,
    and judge whether it is the greedy one.
    """
    prompt = random_prompt(random.Random(63), 40, 40)
    greedy = demo.ask(prompt=prompt, max_tokens=6, **{**SCORED, "echo": False}).tokens
    other = [token + 1 for token in greedy]
    with openai.OpenAI(base_url=f"{demo.base}/v1", api_key="none", max_retries=0) as client:
        asked = [prompt + greedy, prompt + other]
        done = client.completions.create(
            model="demo", prompt=asked, echo=True, logprobs=1, max_tokens=1, temperature=0.0, seed=1
        )
    assert done.usage is not None and done.usage.completion_tokens == 2
    for choice, whole, is_greedy in zip(done.choices, asked, (True, False), strict=True):
        values, tops = choice.logprobs.token_logprobs[40:-1], choice.logprobs.top_logprobs[40:-1]
        assert all(value == max(top.values()) for value, top in zip(values, tops, strict=True)) == is_greedy
        certain = oracle.score(whole)
        assert choice.logprobs.token_logprobs[1:][: len(certain)] == pytest.approx([*certain], abs=1e-3)
        assert len(values) == 6


def test_the_cluster_says_where_experts_live(demo: Served) -> None:
    """Each on one rank, whichever it has moved to."""
    spans = demo.cluster()["placement"]
    assert sorted(layer for span in spans for layer in range(span["layers"][0], span["layers"][1] + 1)) == [
        0,
        1,
        2,
    ]
    for span in spans:
        held = [expert for rank in span["experts"] for low, high in rank for expert in range(low, high + 1)]
        assert sorted(held) == list(range(32)) and len(span["experts"]) == 2


def test_a_killed_rank_neither_repeats_nor_loses_a_position(calling: Served) -> None:
    """Prompts of some fifty steps each are sent again and again, so both ranks work on some when
    one of them dies.
    """
    dice = random.Random(64)
    prompts = [random_prompt(dice, 2500, 2500) for _ in range(6)]
    victim, epoch = calling.launcher.pid_of("rank 1"), calling.cluster()["epoch"]
    began = time.monotonic()
    quiet = [calling.ask(prompt=prompt, logprobs=20, max_tokens=2, **SCORED) for prompt in prompts[:2]]
    seconds = time.monotonic() - began  # of two, one after the other: the least that six take on two ranks
    asks = [Ask({"prompt": prompt, "logprobs": 20, "max_tokens": 2, **SCORED}) for prompt in prompts]
    rounds: list[list[Answer]] = []
    killed = threading.Event()

    def insist() -> None:
        while not killed.is_set():
            rounds.append(calling.ok(asks))

    thread = threading.Thread(target=insist, daemon=True)
    thread.start()
    time.sleep(seconds / 2)
    assert thread.is_alive()
    os.kill(victim, signal.SIGKILL)
    killed.set()
    thread.join(100)
    assert rounds and not thread.is_alive()
    for answers in rounds:
        found = [scores(answer, prompt) for answer, prompt in zip(answers, prompts, strict=True)]
        for values, answer, prompt in zip(found, quiet, prompts, strict=False):
            assert values == pytest.approx(scores(answer, prompt), abs=1e-3)
    calling.wait_until(lambda: calling.cluster()["epoch"] > epoch, "the state of the cluster after the loss")
    calling.assert_clean()
