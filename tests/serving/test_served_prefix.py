"""The prefix cache of a served model: which prompts hit, on which rank, and that tokens do not
depend on it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from support.serving.mixed_asks import Known, Oracle, random_prompt
from support.serving.served import PAGE_SIZE, Ask, Body, Served, serve

NUM_PREFIX = 1000
FULL = NUM_PREFIX - NUM_PREFIX % PAGE_SIZE
GREEDY: Body = {"temperature": 0.0, "ignore_eos": True}


@pytest.fixture(scope="module")
def uncached(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(tmp_path_factory.mktemp("uncached") / "run", "kv_cache.prefix_caching=false") as served:
        yield served


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A cluster with two rows per rank."""
    with serve(
        tmp_path_factory.mktemp("narrow") / "run", "scheduler.max_running=2", "kv_cache.memory=8MiB"
    ) as served:
        yield served


@pytest.fixture
def prefix(request: pytest.FixtureRequest) -> list[int]:
    """A prefix that no other test has sent."""
    return random_prompt(random.Random(request.node.name), NUM_PREFIX, NUM_PREFIX)


def test_a_prefix_sent_again_hits(demo: Served, prefix: list[int]) -> None:
    queries, hits = demo.counted("prefix_cache_queries", "prefix_cache_hits")
    first = demo.ask(prompt=prefix, max_tokens=8, return_token_ids=True, **GREEDY)
    assert first.cached == 0
    again = demo.ask(prompt=prefix, max_tokens=8, return_token_ids=True, **GREEDY)
    longer = demo.ask(prompt=[*prefix, 7, 8, 9], max_tokens=8, **GREEDY)
    assert 0.95 * FULL <= again.cached <= FULL
    assert 0.95 * FULL <= longer.cached <= FULL
    assert again.tokens == first.tokens
    told = demo.counted("prefix_cache_queries", "prefix_cache_hits")
    assert told == [queries + 3 * NUM_PREFIX + 3, hits + again.cached + longer.cached]


def test_a_conversation_goes_on_from_its_own_output(demo: Served, prefix: list[int]) -> None:
    prompt = prefix[:100]
    first = demo.ask(prompt=prompt, max_tokens=60, return_token_ids=True, **GREEDY)
    second = demo.ask(prompt=[*prompt, *first.tokens, 9], max_tokens=1, **GREEDY)
    assert second.cached == (100 + 60 - 1) // PAGE_SIZE * PAGE_SIZE  # the last sampled token has no KV


def test_a_different_salt_or_first_token_hits_nothing(demo: Served, prefix: list[int]) -> None:
    demo.ask(prompt=prefix, max_tokens=1, **GREEDY)
    assert demo.ask(prompt=prefix, max_tokens=1, cache_salt="other", **GREEDY).cached == 0
    assert demo.ask(prompt=[prefix[0] + 1, *prefix[1:]], max_tokens=1, **GREEDY).cached == 0


def test_equal_prefixes_at_once_are_computed_once_per_rank(
    demo: Served, prefix: list[int], oracle: Oracle
) -> None:
    bodies = [
        {"prompt": [*prefix, 5 + index], "max_tokens": 4, "return_token_ids": True, **GREEDY}
        for index in range(100)
    ]
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    answers = demo.ok([Ask(body | streamed if index % 2 else body) for index, body in enumerate(bodies)])
    cached = [answer.cached for answer in answers]
    assert sum(FULL - each for each in cached) <= 2 * FULL, cached
    assert cached.count(0) in (1, 2)
    certain = [
        oracle.certain(body, answer.tokens) for body, answer in zip(bodies[::10], answers[::10], strict=True)
    ]
    assert sum(map(len, certain)) > 20


def test_a_request_whose_home_rank_is_full_runs_elsewhere(narrow: Served, prefix: list[int]) -> None:
    """The rank that has the prefix gets as many long requests as it has rows; one more still
    finishes meanwhile.
    """
    narrow.ask(prompt=prefix, max_tokens=1, **GREEDY)
    home = next(rank["rank"] for rank in _ranks(narrow) if rank["pages_cached"] >= FULL // PAGE_SIZE)
    with ExitStack() as stack:
        streams = [
            stack.enter_context(narrow.http.stream("POST", "/v1/completions", json=_long(prefix)))
            for _ in range(2)
        ]
        lines = [stream.iter_lines() for stream in streams]  # kept: the end of an iterator ends its stream
        assert all(next(each).startswith("data: ") for each in lines)
        narrow.wait_until(
            lambda: _ranks(narrow)[home]["num_running"] == 2, "both rows of the home rank are taken"
        )
        third = narrow.ask(prompt=prefix, max_tokens=8, return_token_ids=True, **GREEDY)
        assert third.usage["completion_tokens"] == 8
        assert third.cached == 0, "it did not run on the other rank"
        assert narrow.metrics()["num_requests_running"] >= 2
        fourth = narrow.ask(prompt=prefix, max_tokens=8, return_token_ids=True, **GREEDY)
        assert fourth.cached >= 0.95 * FULL, "the other rank has computed it by now"
        assert _ranks(narrow)[home]["num_running"] == 2, "the home rank was not full all the time"
        assert third.tokens == fourth.tokens
    narrow.assert_clean()


def test_tokens_do_not_depend_on_the_cache(demo: Served, uncached: Served, oracle: Oracle) -> None:
    """Prompts that share prefixes of many lengths, asked twice and with the answer appended."""
    dice = random.Random(8)
    trunk = random_prompt(dice, 400, 400)
    bodies: list[Body] = [
        {"prompt": trunk[: dice.randrange(1, 400)] + random_prompt(dice, 0, 40), **GREEDY} for _ in range(16)
    ]
    known = oracle.know(uncached, bodies, 40)
    known += oracle.know(
        uncached, [{"prompt": [*each.body["prompt"], *each.tokens], **GREEDY} for each in known], 40
    )
    _assert_same_cached(demo, known)
    assert _assert_same_cached(demo, known) > len(known) * 150
    assert uncached.ask(prompt=bodies[0]["prompt"], max_tokens=1).cached == 0
    assert uncached.counted("prefix_cache_hits") == [0]


def _assert_same_cached(served: Served, known: list[Known]) -> int:
    """Asks in order, four at a time; returns the cached tokens."""
    cached = 0
    for start in range(0, len(known), 4):
        part = known[start : start + 4]
        for each, answer in zip(part, served.ok([each.ask(40) for each in part]), strict=True):
            each.assert_same(answer, f"{answer.cached} tokens cached")
            cached += answer.cached
    return cached


def _long(prefix: list[int]) -> Body:
    return {"prompt": prefix, "max_tokens": 3000, "stream": True, **GREEDY}


def _ranks(served: Served) -> list[Body]:
    served.counted()
    return list(served.cluster()["ranks"])
