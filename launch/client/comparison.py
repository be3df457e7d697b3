"""Compares an answer with a stored one, token for token. Log-probabilities are natural."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from .answers import AnsweredToken, CanaryAnswer


class Outcome(StrEnum):
    """The result of a comparison. The first two count as the same answer."""

    SAME = "same"
    NEAR_TIE = "near tie"
    SHIFTED = "logprobs differ"
    DIFFERENT = "tokens differ"
    PROMPT = "prompt differs"

    @property
    def alarming(self) -> bool:
        return self not in (Outcome.SAME, Outcome.NEAR_TIE)


@dataclass(frozen=True)
class Fork:
    """The first place at which two answers differ; None for an answer that had ended.

    ``gap_before``, ``gap_now``: log-probability of the chosen token less that of the other
    answer's token, in the same answer; None where that token is not among the alternatives.
    """

    position: int
    before: AnsweredToken | None
    now: AnsweredToken | None
    gap_before: float | None
    gap_now: float | None

    def near(self, tolerance: float) -> bool:
        """Whether both answers rate both tokens within ``tolerance``; both must know them."""
        return (
            self.gap_before is not None
            and self.gap_now is not None
            and max(abs(self.gap_before), abs(self.gap_now)) <= tolerance
        )


@dataclass(frozen=True)
class Comparison:
    """``largest``, ``mean``: absolute difference of log-probabilities over the tokens before the
    fork, 0 without any.
    """

    name: str
    outcome: Outcome
    num_tokens: int
    num_equal: int
    largest: float
    mean: float
    fork: Fork | None


def compare(before: CanaryAnswer, now: CanaryAnswer, tolerance: float) -> Comparison:
    """Compares a stored answer with a new one to the same prompt.

    A near tie is a fork whose two tokens are within ``tolerance`` of each other in both answers,
    behind equal tokens whose log-probabilities differ by no more.
    """
    pairs = list(zip(before.tokens, now.tokens, strict=False))
    equal = next((place for place, (a, b) in enumerate(pairs) if a.id != b.id), len(pairs))
    distances = [_distance(a.logprob, b.logprob) for a, b in pairs[:equal]]
    largest = max(distances, default=0.0)
    mean = sum(distances) / max(1, equal)
    fork = None
    if equal < max(len(before.tokens), len(now.tokens)):
        fork = _fork(equal, _at(before.tokens, equal), _at(now.tokens, equal))
    outcome = Outcome.SAME
    if before.prompt_ids != now.prompt_ids:
        outcome = Outcome.PROMPT
    elif fork is not None and not (fork.near(tolerance) and largest <= tolerance):
        outcome = Outcome.DIFFERENT
    elif largest > tolerance:
        outcome = Outcome.SHIFTED
    elif fork is not None:
        outcome = Outcome.NEAR_TIE
    return Comparison(before.asked.name, outcome, len(before.tokens), equal, largest, mean, fork)


def worst(compared: Iterable[Comparison]) -> bool:
    """Whether any answer differs by more than a near tie."""
    return any(each.outcome.alarming for each in compared)


def _distance(before: float, now: float) -> float:
    """Absolute difference; infinite if either value is no number."""
    distance = abs(before - now)
    return math.inf if math.isnan(distance) else distance


def _at(tokens: list[AnsweredToken], place: int) -> AnsweredToken | None:
    return tokens[place] if place < len(tokens) else None


def _fork(position: int, before: AnsweredToken | None, now: AnsweredToken | None) -> Fork:
    if before is None or now is None:
        return Fork(position, before, now, None, None)
    return Fork(position, before, now, _gap(before, now), _gap(now, before))


def _gap(chosen: AnsweredToken, other: AnsweredToken) -> float | None:
    """The gap between two tokens, by their texts; None if these are equal or one is unknown."""
    if chosen.token == other.token:
        return None
    known = {each.token: each.logprob for each in chosen.alternatives}
    return chosen.logprob - known[other.token] if other.token in known else None
