"""Trials of grammars, so that a rank never has to abandon one that it follows."""

from __future__ import annotations

import random
import time

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask
from numpy.typing import NDArray

from ...text.matcher import new_matcher, no_token, reason_of

WALKS = 2
WALK_TOKENS = 24
LONG_WALK_TOKENS = 128
LONG_WALK_SECONDS = 0.3
SLOW_MASK_SECONDS = 0.001
NO_TEXT = "it allows no text at all"


class Trial:
    """Compiles grammars and writes random texts of them with the model's own tokens, under the
    limits of a rank. Compiling ends only with its process.
    """

    def __init__(self, vocabulary: LLTokenizer) -> None:
        self._vocabulary = vocabulary
        sizes = [len(vocabulary.decode_bytes([token])) for token in range(vocabulary.vocab_size)]
        self._short = np.array(sizes) == 1
        self._no_end = np.ones(vocabulary.vocab_size, np.bool_)
        self._no_end[vocabulary.eos_tokens] = False

    def fault(self, grammar: str) -> str:
        """The reason why ``grammar`` cannot be followed; empty if it can be."""
        matcher = new_matcher(self._vocabulary, grammar)
        if matcher.is_error():
            return reason_of(matcher)
        until = time.process_time() + LONG_WALK_SECONDS
        for number in range(WALKS):
            fault = self._walk(matcher.deep_copy(), random.Random(number), until)
            if fault:
                return fault
        return ""

    def _walk(self, matcher: LLMatcher, chance: random.Random, until: float) -> str:
        """Writes a random text and returns its fault. Follows a grammar with slow masks (many
        states) further, if there is time.
        """
        slowest = 0.0
        for number in range(LONG_WALK_TOKENS):
            start = time.process_time()
            allowed = self._allowed(matcher)
            now = time.process_time()
            slowest = max(slowest, now - start)
            if not len(allowed) and matcher.is_accepting():
                return ""
            if matcher.is_error():
                return NO_TEXT if not number and no_token(matcher) else reason_of(matcher)
            if not matcher.consume_token(self._choose(allowed, chance)):
                return reason_of(matcher)
            more = slowest > SLOW_MASK_SECONDS and now < until
            if matcher.is_stopped() or (number >= WALK_TOKENS and not more):
                break
        return reason_of(matcher) if matcher.is_error() else ""

    def _allowed(self, matcher: LLMatcher) -> NDArray[np.int64]:
        """Tokens that may follow, except those that end the text."""
        bits_1W = allocate_token_bitmask(1, self._vocabulary.vocab_size)
        fill_next_token_bitmask(matcher, bits_1W)
        flags = np.unpackbits(bits_1W[0].view(np.uint8), bitorder="little")[: len(self._no_end)]
        return np.flatnonzero(flags & self._no_end)

    def _choose(self, allowed: NDArray[np.int64], chance: random.Random) -> int:
        """Chooses among all tokens, which go deep into patterns, or single bytes, which find the
        ends of texts and keys.
        """
        short = allowed[self._short[allowed]]
        chosen = short if len(short) and chance.random() < 0.5 else allowed
        return int(chosen[chance.randrange(len(chosen))])
