"""Rules about tokens on a rank: bad words and allowed ids, alone, in company and after a replay."""

from __future__ import annotations

import math
from array import array
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from lockstep.engine.protocol.message import Sampling
from lockstep.engine.protocol.plan import Admit, Header, Mode, Section, StepPlan
from lockstep.engine.rank.bad_words import BadWords
from lockstep.engine.rank.slot_sampling import SlotSettings
from lockstep.kernels.reference.sampling import allow_only, edit_logits
from support.engine.models.checkpoints import qwen3_moe_config, write_checkpoint
from support.engine.rank.hand_plans import GREEDY, Driver, Request, build_executor
from support.engine.rank.run_step import run_step

VOCABULARY = 70
words = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), max_size=6)
outputs = st.lists(st.integers(0, 3), max_size=12)


def packed(sequences: list[list[int]]) -> bytes:
    return array("i", [token for word in sequences for token in (*word, -1)]).tobytes()


def ranges(*pairs: int) -> bytes:
    return array("i", pairs).tobytes()


def logits_after(settings: SlotSettings, slots: list[int], positions: list[int]) -> torch.Tensor:
    """Equal logits of rows, edited: 0 where a token may be sampled, else -inf."""
    rows = settings.rows(np.array(slots, np.int64))
    logits = torch.zeros(len(slots), VOCABULARY)
    edits = settings.edits(rows, np.array(positions, np.int64))
    if edits is not None:
        edit_logits(logits, edits)
    if rows.allowed is not None:
        allow_only(logits, *rows.allowed)
    return logits


def open_tokens(logits: torch.Tensor) -> list[set[int]]:
    return [set(np.flatnonzero(row > -math.inf).tolist()) for row in logits.numpy()]


@given(words, outputs, st.integers(0, 12))
def test_the_last_token_of_a_bad_word_is_forbidden_behind_its_others(
    bad: list[list[int]], output: list[int], cut: int
) -> None:
    """Also after a replay that begins anywhere in the output."""
    emitted = output[:cut]
    follower = BadWords(np.frombuffer(packed(bad), np.int32), np.array(emitted, np.int32))
    for token in output[cut:]:
        follower.add(token)
    expected = {word[-1] for word in bad if len(word) == 1 or output[1 - len(word) :] == word[:-1]}
    found = follower.forbidden.tolist()
    assert sorted(found) == sorted(expected), "each once"


def test_rows_with_rules_leave_the_others_alone() -> None:
    settings = SlotSettings(6, VOCABULARY)
    history = np.array([5, 6, 7, 8, 9], np.int32)
    settings.admit(0, Sampling(), history, 0)
    settings.admit(1, Sampling(bad_words_i32=packed([[3], [8, 9, 10], [9, 11], [7, 7]])), history, 3)
    settings.admit(2, Sampling(allowed_i32=ranges(2, 4, 69, 69)), history, 0)
    settings.admit(3, Sampling(min_tokens=9, stop_i32=ranges(3, 4), allowed_i32=ranges(3, 6)), history, 0)
    every = set(range(VOCABULARY))
    shown = open_tokens(logits_after(settings, [0, 1, 2, 3], [5, 5, 5, 5]))
    assert shown == [every, every - {3, 10, 11}, {2, 3, 4, 69}, {5, 6}]
    settings.observe(np.array([3, 1]), np.array([7, 7]))
    assert open_tokens(logits_after(settings, [1, 0], [6, 6])) == [every - {3, 7}, every]
    settings.admit(2, Sampling(), history, 0)
    assert open_tokens(logits_after(settings, [2], [6])) == [every]
    rows = settings.rows(np.array([0, 2]))
    assert rows.allowed is None and settings.edits(rows, np.array([5, 6])) is not None


def test_the_prompt_is_no_part_of_a_bad_word() -> None:
    settings = SlotSettings(1, VOCABULARY)
    settings.admit(0, Sampling(bad_words_i32=packed([[8, 9]])), np.array([7, 8], np.int32), 0)
    assert open_tokens(logits_after(settings, [0], [2])) == [set(range(VOCABULARY))]
    settings.observe(np.array([0]), np.array([8]))
    assert open_tokens(logits_after(settings, [0], [3])) == [set(range(VOCABULARY)) - {9}]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("rules") / "model", qwen3_moe_config())


def test_a_model_keeps_the_rules_and_comes_back_to_them(checkpoint: Path) -> None:
    """Greedy: each pair of neighbours of the free text becomes a bad word, or half the vocabulary
    is left. Whatever the company and wherever a replay begins, the text is the same.
    """
    prompt = list(range(20, 40))
    [free] = Driver(build_executor(checkpoint), [Request(prompt, 20)]).run()
    bad = [list(pair) for pair in pairwise(free)] + [[free[0]]]
    rules = [
        Sampling(temperature=0.0, bad_words_i32=packed(bad)),
        Sampling(temperature=0.0, allowed_i32=ranges(0, 99, 150, 150)),
        Sampling(temperature=1.2, seed=3, allowed_i32=ranges(5, 60), bad_words_i32=packed([[7], [8, 9]])),
    ]
    alone = [Driver(build_executor(checkpoint), [Request(prompt, 20, rule)]).run()[0] for rule in rules]
    assert free[0] not in alone[0] and not set(pairwise(free)) & set(pairwise(alone[0]))
    assert all(token < 100 or token == 150 for token in alone[1])
    assert all(5 <= token <= 60 and token != 7 for token in alone[2])
    mixed = [Request(prompt, 20, rule, start=at) for at, rule in enumerate([*rules, GREEDY])]
    assert Driver(build_executor(checkpoint), mixed).run() == [*alone, free]
    executor = build_executor(checkpoint)
    for cut in (1, 9):
        for rule, whole in zip(rules, alone, strict=True):
            history = prompt + whole[:cut]
            executor.stage(0, np.asarray(history, np.int32).tobytes())
            admit = Admit(5, 0, 0, cut, len(prompt) + 20, np.arange(32, dtype=np.int32).tobytes(), rule)
            extend = np.array([5, len(history)], np.int32).tobytes()
            first = Section(rebase=True, admit=(admit,), extend_pairs=extend)
            tokens = list(whole[:cut])
            for step in range(20 - cut):
                header = Header(0, 0, step, step - 1, Mode.MIXED, 512)
                result = run_step(executor, StepPlan(header, Section() if step else first))
                tokens += np.frombuffer(result.tokens_i32, np.int32).tolist()
            assert tokens == whole, f"cut at {cut}"


def test_ranks_are_places_in_the_order_of_the_likeliest(checkpoint: Path) -> None:
    prompt = list(range(20, 40))
    asked = Sampling(temperature=0.0, num_prompt_logprobs=320, prompt_ranks=True)
    driver = Driver(build_executor(checkpoint), [Request(prompt, 1, asked, chunk=7)])
    driver.run()
    lines = [line for result in driver.results for line in result.prompt_logprobs]
    ranks = [rank for line in lines for rank in array("i", line.ranks_i32)]
    orders = [order for line in lines for order in np.frombuffer(line.top_ids_i32, np.int32).reshape(-1, 320)]
    assert len(ranks) == len(prompt) - 1
    assert ranks == [order.tolist().index(token) + 1 for order, token in zip(orders, prompt[1:], strict=True)]


@pytest.mark.parametrize(
    ("sampling", "grammar", "plain"),
    [
        (Sampling(temperature=0.0), False, True),
        (Sampling(temperature=1e-6, top_k=5, stop_i32=packed([[3]])), False, True),
        (Sampling(temperature=0.0), True, False),
        (Sampling(temperature=0.5), False, False),
        (Sampling(temperature=0.0, num_logprobs=0), False, False),
        (Sampling(temperature=0.0, frequency_penalty=0.1), False, False),
        (Sampling(temperature=0.0, min_tokens=1), False, False),
        (Sampling(temperature=0.0, allowed_i32=ranges(2, 4)), False, False),
        (Sampling(temperature=0.0, bad_words_i32=packed([[3]])), False, False),
    ],
)
def test_rows_that_take_the_most_likely_token_and_ask_for_nothing_else(
    sampling: Sampling, grammar: bool, plain: bool
) -> None:
    settings = SlotSettings(2, 70)
    settings.admit(1, Sampling(temperature=float(plain)), np.zeros(4, np.int32), 0)
    settings.admit(1, sampling, np.zeros(4, np.int32), 0, grammar)
    assert settings.plain(np.array([1, 0])).tolist() == [plain, False]
    follows = grammar or sampling.frequency_penalty > 0 or bool(sampling.bad_words_i32)
    assert settings.follows(np.array([1, 0])) == follows and not settings.follows(np.array([0]))
