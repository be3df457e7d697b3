"""Limits of matchers: each is named in our own words, whatever the library calls it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from llguidance import LLMatcher, LLParserLimits

from lockstep.engine.text.matcher import new_matcher, reason_of
from support.engine.text.byte_vocabulary import byte_vocabulary

PROPERTIES = {f"f{number}": {"type": "integer"} for number in range(50)}
OBJECT = "start: %json " + json.dumps({"type": "object", "properties": PROPERTIES})
STATES = "start: /(.*a.{30}){3}/"


@pytest.mark.parametrize(
    ("grammar", "text", "limit", "reason"),
    [
        (OBJECT, '{"f1"', {"max_items_in_row": 20}, "too many choices at one place; the limit is 4000"),
        (OBJECT, '{"f1"', {"step_max_items": 20}, "too many choices in one step; the limit is 100000"),
        (STATES, "abbb", {"step_lexer_fuel": 100}, "too complex; the limit is 1000000 units a token"),
        (STATES, "abbbaabaab", {"max_lexer_states": 100}, "too complex; the limit is 50000 states"),
        (STATES, "", {"initial_lexer_fuel": 10}, "too complex; the limit is 1000000 units at the start"),
        (OBJECT, "", {"max_grammar_size": 100}, "too large; the limit is 500000 symbols"),
    ],
)
def test_each_limit_has_words(grammar: str, text: str, limit: dict[str, Any], reason: str) -> None:
    matcher = LLMatcher(byte_vocabulary(), grammar, log_level=0, limits=LLParserLimits(**limit))
    for byte in text.encode():
        matcher.compute_bitmask()
        if matcher.is_error():
            break
        matcher.consume_token(byte)
    assert matcher.is_error()
    assert reason in reason_of(matcher)


def test_an_error_is_one_line_without_the_grammar() -> None:
    reason = reason_of(new_matcher(byte_vocabulary(), 'start: "a" | nothing_like_it'))
    assert "nothing_like_it" in reason
    assert "\n" not in reason
    assert "start:" not in reason
