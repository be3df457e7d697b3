"""Comparison of answers: where they fork, near ties, distances of log-probabilities."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from lockstep.launch.client.answers import Alternative, AnsweredToken, CanaryAnswer, CanaryPrompt
from lockstep.launch.client.canary_screen import show_comparisons
from lockstep.launch.client.comparison import Outcome, compare, worst


def token(number: int, logprob: float, **others: float) -> AnsweredToken:
    """Token ``number`` with the text tN."""
    known = {f"t{number}": logprob} | others
    return AnsweredToken(number, f"t{number}", logprob, [Alternative(*each) for each in known.items()])


def answer(*tokens: AnsweredToken, prompt: tuple[int, ...] = (7, 8)) -> CanaryAnswer:
    return CanaryAnswer(CanaryPrompt("one", "text"), list(prompt), list(tokens))


STORED = answer(token(1, -0.1), token(2, -0.7, t3=-0.71), token(4, -0.2))


def test_equal_answers_are_the_same() -> None:
    found = compare(STORED, STORED, 0.0)
    assert (found.outcome, found.num_equal, found.largest, found.mean, found.fork) == (
        Outcome.SAME,
        3,
        0.0,
        0.0,
        None,
    )
    assert not worst([found])


def test_distances_are_those_of_the_tokens_before_the_fork() -> None:
    now = answer(token(1, -0.13), token(2, -0.71), token(9, -5.0))
    found = compare(STORED, now, 0.05)
    assert (found.largest, found.mean) == (pytest.approx(0.03), pytest.approx(0.02))
    assert (found.outcome, found.num_equal) == (Outcome.DIFFERENT, 2)


def test_a_token_that_was_as_likely_is_a_near_tie() -> None:
    now = answer(token(1, -0.1), token(3, -0.69, t2=-0.7), token(5, -3.0))
    found = compare(STORED, now, 0.05)
    assert found.outcome is Outcome.NEAR_TIE
    assert found.fork is not None
    assert (found.fork.position, found.fork.gap_before, found.fork.gap_now) == (
        1,
        pytest.approx(0.01),
        pytest.approx(0.01),
    )
    assert not worst([found])
    assert compare(STORED, now, 0.005).outcome is Outcome.DIFFERENT


@pytest.mark.parametrize(
    "now",
    [
        pytest.param(answer(token(1, -0.1), token(3, -0.1, t2=-2.0)), id="sure of the other token now"),
        pytest.param(answer(token(1, -0.1), token(3, -0.69)), id="stored token no longer known"),
        pytest.param(answer(token(1, -0.1), token(6, -0.69, t2=-0.69)), id="new token was not known"),
        pytest.param(answer(token(1, -0.9), token(3, -0.69, t2=-0.7)), id="near, behind a shifted token"),
        pytest.param(answer(token(1, -0.1)), id="ended early"),
        pytest.param(answer(*STORED.tokens, token(1, -0.1)), id="goes on"),
    ],
)
def test_other_forks_are_differences(now: CanaryAnswer) -> None:
    found = compare(STORED, now, 0.05)
    assert found.outcome is Outcome.DIFFERENT
    assert worst([found])


@pytest.mark.parametrize("logprob", [-0.2 - 0.06, math.nan, -math.inf])
def test_the_same_tokens_with_other_logprobs_are_told_apart(logprob: float) -> None:
    found = compare(STORED, answer(*STORED.tokens[:2], token(4, logprob)), 0.05)
    assert (found.outcome, found.num_equal) == (Outcome.SHIFTED, 3)
    assert worst([found])


def test_a_prompt_that_is_tokenised_differently_is_named() -> None:
    found = compare(STORED, answer(*STORED.tokens, prompt=(7, 9)), 0.05)
    assert found.outcome is Outcome.PROMPT
    assert worst([found])


def test_two_tokens_of_one_text_have_no_gap() -> None:
    twin = AnsweredToken(12, "t2", -0.7, [Alternative("t2", -0.7)])
    found = compare(STORED, answer(token(1, -0.1), twin), 0.05)
    assert found.outcome is Outcome.DIFFERENT
    assert found.fork is not None and found.fork.gap_before is found.fork.gap_now is None


def test_the_table_says_where_answers_fork_and_what_both_tokens_were_worth() -> None:
    near = compare(STORED, answer(token(1, -0.1), token(3, -0.69, t2=-0.7)), 0.05)
    ended = compare(STORED, answer(token(1, -0.1)), 0.05)
    text = io.StringIO()
    show_comparisons([near, ended], 0.05, Console(file=text, width=120))
    shown = text.getvalue()
    assert (
        "one: differs first at token 2: stored 't2' (id 2) at -0.7000, 't3' at -0.7100; "
        "now 't3' (id 3) at -0.6900, 't2' at -0.7000"
    ) in " ".join(shown.split())
    assert "now the answer had ended" in " ".join(shown.split())
    assert "2 prompts: 1 near tie, 1 tokens differ (--tolerance 0.05)" in shown
