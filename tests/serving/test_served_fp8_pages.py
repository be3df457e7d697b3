"""FP8 pages on two ranks: with or without the prefix cache, whole prompts and chunks give the same
greedy tokens; also where every other layer has a window and sinks.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.engine.models.checkpoints import write_checkpoint
from support.engine.models.family_configs import gpt_oss_config
from support.serving.mixed_asks import random_prompt
from support.serving.random_checkpoint import CONFIG, write_tokenizer
from support.serving.served import PAGE_SIZE, Answer, Ask, Body, Served, serve

NUM_PROMPTS, NUM_NEW = 10, 12
LOGIT_MARGIN = 0.02


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(tmp_path_factory.mktemp("fp8") / "run", "kv_cache.dtype=fp8") as served:
        yield served


@pytest.fixture(scope="module")
def uncached(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    overrides = (
        "kv_cache.dtype=fp8",
        "kv_cache.prefix_caching=false",
        "scheduler.max_batch_tokens=64",
        "scheduler.max_running=16",
    )
    with serve(tmp_path_factory.mktemp("uncached") / "run", *overrides) as served:
        yield served


def test_tokens_depend_neither_on_the_cache_nor_on_chunks(cached: Served, uncached: Served) -> None:
    """Prompts that share prefixes, asked twice where they are cached; tokens are compared up to the
    first close choice.
    """
    dice = random.Random(3)
    trunk = random_prompt(dice, 300, 300)
    bodies: list[Body] = [
        {
            "prompt": trunk[: dice.randrange(1, 300)] + random_prompt(dice, 0, 30),
            "max_tokens": NUM_NEW,
            "temperature": 0.0,
            "ignore_eos": True,
        }
        for _ in range(NUM_PROMPTS)
    ]
    asks = [Ask(body | {"return_token_ids": True, "logprobs": 2}) for body in bodies]
    first, again, plain = cached.ok(asks), cached.ok(asks), uncached.ok(asks)
    assert sum(answer.cached for answer in again) > NUM_PROMPTS * PAGE_SIZE and not any(
        answer.cached for answer in plain
    )
    assert_same_while_certain(plain, first, again)


def test_windows_and_sinks_over_fp8_pages(tmp_path: Path) -> None:
    """gpt-oss with windows of 12 positions: prompts in chunks, then from cached pages of which most
    lie before a window, then in other chunks under another salt.
    """
    config = gpt_oss_config(vocab_size=CONFIG["vocab_size"])
    write_tokenizer(write_checkpoint(tmp_path / "model", config, seed=5))
    overrides = ("kv_cache.dtype=fp8", f"model.path={tmp_path / 'model'}", "model.max_len=512")
    chunks = ("scheduler.max_batch_tokens=64", "scheduler.max_running=16")
    dice = random.Random(4)
    bodies: list[Body] = [
        {
            "prompt": random_prompt(dice, 150, 300),
            "max_tokens": NUM_NEW,
            "temperature": 0.0,
            "ignore_eos": True,
            "return_token_ids": True,
            "logprobs": 2,
        }
        for _ in range(NUM_PROMPTS)
    ]
    with serve(tmp_path / "run", *overrides, *chunks) as served:
        assert all(rank["pages_total"] for rank in served.cluster()["ranks"])
        plain, again = (served.ok([Ask(body) for body in bodies]) for _ in range(2))
        salted = [Ask(body | {"cache_salt": "other"}) for body in reversed(bodies)]
        others = list(reversed(served.ok(salted)))
        served.assert_clean()
    assert sum(answer.cached for answer in again) > 100 * NUM_PROMPTS
    assert not any(answer.cached for answer in (*plain, *others))
    assert_same_while_certain(plain, again, others)


def assert_same_while_certain(plain: list[Answer], *others: list[Answer]) -> None:
    compared = 0
    for number, (expected, *found) in enumerate(zip(plain, *others, strict=True)):
        sure = certain(expected.document["choices"][0]["logprobs"]["top_logprobs"])
        compared += sure
        for answer in found:
            assert answer.tokens[:sure] == expected.tokens[:sure], f"prompt {number}"
    assert compared > NUM_PROMPTS * NUM_NEW / 3


def certain(top: list[dict[str, float]]) -> int:
    """Number of positions before the first at which the two best tokens are close."""
    for position, choices in enumerate(top):
        values = sorted(choices.values(), reverse=True)
        if len(values) < 2 or values[0] - values[1] < LOGIT_MARGIN:  # two tokens of one text are one entry
            return position
    return len(top)
