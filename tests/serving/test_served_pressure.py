"""More load than KV pages or queue can hold: requests get slower or are refused in time, but tokens
never change.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from support.serving.mixed_asks import Oracle, random_bodies
from support.serving.served import Ask, Served, serve

PAGE_BYTES = 20480
PAGES_PER_RANK = 64
NUM_OUTPUT = 96
MAX_QUEUE = 100


@pytest.fixture(scope="module")
def tight(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("tight") / "run"
    with serve(folder, f"kv_cache.memory={PAGES_PER_RANK * PAGE_BYTES}", "scheduler.max_queue=100") as served:
        assert sum(rank["pages_total"] for rank in served.cluster()["ranks"]) == 2 * PAGES_PER_RANK
        yield served


def test_a_quarter_of_the_memory_changes_no_token(tight: Served, oracle: Oracle) -> None:
    """72 requests of 8 pages at once, for which there are 128 pages. Salts keep equal prompts from
    sharing pages.
    """
    known = oracle.know(tight, random_bodies(random.Random(3), 12, (30, 32)), NUM_OUTPUT)
    [before] = tight.counted("num_preemptions")
    chosen = [known[index % len(known)] for index in range(72)]
    assert len(chosen) * (30 + NUM_OUTPUT) // 16 >= 4 * 2 * PAGES_PER_RANK
    scored = [{"echo": True, "logprobs": 1} if index % 4 == 0 else {} for index in range(72)]
    answers = tight.ok(
        [
            each.ask(NUM_OUTPUT, cache_salt=f"{index}", stream=index % 3 == 0, **scored[index])
            for index, each in enumerate(chosen)
        ]
    )
    for each, answer, extra in zip(chosen, answers, scored, strict=True):
        if extra:
            parts = [
                choice["logprobs"]
                for part in answer.chunks or [answer.document]
                for choice in part["choices"]
            ]
            values = [value for part in parts for value in part["token_logprobs"]]
            certain = oracle.score(each.body["prompt"])
            assert len(values) == len(each.body["prompt"]) + NUM_OUTPUT
            assert values[1 : len(certain) + 1] == pytest.approx(certain, abs=1e-3)
        assert len(answer.tokens) == NUM_OUTPUT
        assert answer.finish == "length"
        each.assert_same(answer, "under pressure")
    assert tight.counted("num_preemptions") > [before], "there was no pressure"
    tight.assert_clean()


def test_a_thousand_at_once_get_tokens_or_503(tight: Served) -> None:
    asks = [
        Ask(
            {
                "prompt": [5 + index % 900, 7, 9],
                "max_tokens": 8,
                "ignore_eos": True,
                "return_token_ids": True,
                "stream": index % 2 == 0,
            }
        )
        for index in range(1000)
    ]
    answers = tight.together(asks)
    served = [answer for answer in answers if answer.status == 200]
    refused = [answer for answer in answers if answer.status == 503]
    assert len(served) + len(refused) == 1000, {answer.status for answer in answers}
    assert all(answer.done and len(answer.tokens) == 8 and answer.finish == "length" for answer in served)
    assert len(served) >= MAX_QUEUE
    assert refused, "the queue was never full"
    for answer in refused:
        error = answer.document["error"]
        assert (error["type"], error["code"]) == ("ServiceUnavailableError", 503)
        assert "scheduler.max_queue" in error["message"]
        assert 1 <= int(answer.headers["retry-after"]) <= 60
    tight.assert_clean()


def test_a_request_as_long_as_the_pool_is_served_and_a_longer_one_refused(tight: Served) -> None:
    room = tight.http.get("/v1/models").json()["data"][0]["max_model_len"]
    assert room == PAGES_PER_RANK * 16
    whole = tight.ask(prompt=[9] * (room - 10), max_tokens=10, ignore_eos=True)
    assert whole.usage["total_tokens"] == room
    [longer] = tight.together([Ask({"prompt": [9] * (room - 10), "max_tokens": 11})])
    assert longer.status == 400
    assert f"maximum context length is {room} tokens" in longer.document["error"]["message"]
    tight.assert_clean()


def test_two_that_each_fill_a_pool_take_turns_with_the_rest(tight: Served) -> None:
    room = PAGES_PER_RANK * 16
    asks = [
        Ask({"prompt": [11 + index] * (room - 40), "max_tokens": 40, "ignore_eos": True})
        for index in range(4)
    ]
    asks += [Ask({"prompt": [21 + index, 8], "max_tokens": 60, "ignore_eos": True}) for index in range(20)]
    assert sum(answer.usage["completion_tokens"] for answer in tight.ok(asks)) == 4 * 40 + 20 * 60
    tight.assert_clean()
