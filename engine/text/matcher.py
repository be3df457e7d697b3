"""Matchers of grammars, with the same limits wherever a grammar is checked or followed."""

from __future__ import annotations

import re

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

# Measured with 150,000 tokens on one core of an x86 server: the longest mask within these limits
# took 150 ms, and usual ones 0.1 ms. A state takes 1 to 2 kB, on a rank for each running request.
MAX_ITEMS_IN_ROW = 4_000
MAX_STEP_ITEMS = 100_000
MAX_STEP_FUEL = 1_000_000
MAX_INITIAL_FUEL = 1_000_000
MAX_STATES = 50_000
MAX_SYMBOLS = 500_000

MAX_MESSAGE_CHARS = 300
_PLACE = re.compile(r"^(at )?\d+\(\d+\): ")
_CONTEXT = re.compile(r"\n *\d+ \| |\n<state>|; consider making your grammar")
_NO_TOKEN = "NoExtensionBias"
_OWN_WORDS = (
    ("oneOf constraints are not supported", "oneOf with members that overlap cannot be held; use anyOf"),
    (_NO_TOKEN, "some of its texts cannot be finished with the tokens of this model"),
    ("items; max is", f"too many choices at one place; the limit is {MAX_ITEMS_IN_ROW} items"),
    ("Too many items", f"too many choices in one step; the limit is {MAX_STEP_ITEMS} items"),
    ("too many expressions", f"its patterns are too complex; the limit is {MAX_STEP_FUEL} units a token"),
    ("too many states", f"its patterns are too complex; the limit is {MAX_STATES} states"),
    ("initial lexer", f"its patterns are too complex; the limit is {MAX_INITIAL_FUEL} units at the start"),
    ("grammar size", f"it is too large; the limit is {MAX_SYMBOLS} symbols"),
)


def new_matcher(vocabulary: LLTokenizer, grammar: str) -> LLMatcher:
    """A matcher at the start of ``grammar``, maybe in its error state.

    The limits bound each later step; nothing bounds the time or the memory of this call but the
    process it runs in.
    """
    limits = LLParserLimits(
        max_items_in_row=MAX_ITEMS_IN_ROW,
        initial_lexer_fuel=MAX_INITIAL_FUEL,
        step_lexer_fuel=MAX_STEP_FUEL,
        step_max_items=MAX_STEP_ITEMS,
        max_lexer_states=MAX_STATES,
        max_grammar_size=MAX_SYMBOLS,
    )
    return LLMatcher(vocabulary, grammar, log_level=0, limits=limits)


def reason_of(matcher: LLMatcher) -> str:
    """The error of a matcher in one line: limits in our words, without the grammar it quotes."""
    error = matcher.get_error()
    for mark, text in _OWN_WORDS:
        if mark in error:
            return text
    text = _PLACE.sub("", _CONTEXT.split(error, maxsplit=1)[0])
    return " ".join(text.split())[:MAX_MESSAGE_CHARS]


def no_token(matcher: LLMatcher) -> bool:
    """Whether the error of a matcher is that no token may follow."""
    return _NO_TOKEN in matcher.get_error()
