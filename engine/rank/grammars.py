"""Structured output on a rank: grammars that compile beside the steps, a matcher for each slot that
has a grammar, and the token masks.

A matcher follows the tokens that its slot samples. When its request is preloaded again, the matcher
is rebuilt from the tokens emitted so far: a preemption, a replay or a replaced rank changes no
output. Rows without a grammar cost nothing. It does without torch. Suffixes: S rows with a grammar,
W words of 32 tokens.
"""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from ..protocol.arrays import Int32, Int64
from ..text.matcher import new_matcher, reason_of
from .masks import Bits, Filler, Masks

_LOG = logging.getLogger(__name__)

CACHED_GRAMMARS = 64


class Grammars:
    """Grammars of preloaded prompts by their number, and matchers of running requests by slot."""

    def __init__(self, vocabulary: LLTokenizer) -> None:
        self._vocabulary = vocabulary
        # Only the one thread of the pool below calls it.
        self._compiled = lru_cache(maxsize=CACHED_GRAMMARS)(self._compile)
        self._pool = ThreadPoolExecutor(1, "grammars")
        self._filler = Filler()
        self._staged: dict[int, Future[LLMatcher]] = {}
        self._untold: set[int] = set()
        self._slots: dict[int, _Follower] = {}

    # ----------------------------------------------------------------- staging

    @property
    def compiling(self) -> bool:
        """Whether ``take_compiled`` has a prompt to return, now or soon."""
        return bool(self._untold)

    def stage(self, staged: int, grammar: str, emitted: Int32) -> None:
        """Begins to compile the grammar of a preloaded prompt whose last tokens, ``emitted``,
        follow the grammar already.
        """
        self._staged[staged] = self._pool.submit(self._build, grammar, emitted.tolist())
        self._untold.add(staged)

    def take_compiled(self) -> list[tuple[int, str]]:
        """Prompts whose grammars have been compiled since the last call, with an error where that
        failed.
        """
        done = [staged for staged in sorted(self._untold) if self._staged[staged].done()]
        self._untold.difference_update(done)
        told = []
        for staged in done:
            error = self._staged[staged].exception()
            if error is not None:
                del self._staged[staged]
                _LOG.warning("the grammar of staged prompt %d cannot be followed: %s", staged, error)
            told.append((staged, "" if error is None else str(error)))
        return told

    def unstage(self, staged: int) -> None:
        future = self._staged.pop(staged, None)
        if future is not None:
            future.cancel()
            self._untold.discard(staged)

    def rebase(self, staged_from: int) -> None:
        """Forgets all slots, and prompts numbered below ``staged_from``."""
        self._slots.clear()
        for staged in [staged for staged in self._staged if staged < staged_from]:
            self.unstage(staged)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._filler.close()

    # ----------------------------------------------------------------- running

    def admit(self, slot: int, staged: int, stop_ids: Int32) -> None:
        """Gives a slot the matcher of a preloaded prompt, if it has one. A sequence ends with one
        of ``stop_ids``.
        """
        future = self._staged.pop(staged, None)
        self._slots.pop(slot, None)
        if future is not None:
            self._slots[slot] = _Follower(slot, future.result(timeout=0), stop_ids, self._vocabulary)

    def begin(self, slots: Int64) -> Masks | None:
        """Begins to compute masks for the slots that have a grammar, in another thread. None when
        none has.
        """
        if not self._slots:
            return None
        followers = [self._slots[slot] for slot in slots.tolist() if slot in self._slots]
        if not followers:
            return None
        bits_SW = allocate_token_bitmask(len(followers), self._vocabulary.vocab_size)
        return Masks(self._filler, followers, bits_SW)

    def observe(self, slots: Int64, tokens: Int64) -> dict[int, str]:
        """Advances the matchers by the tokens that their slots have sampled. Returns the slots that
        cannot go on, and why: their tokens are none.
        """
        errors: dict[int, str] = {}
        if self._slots:
            for slot, token in zip(slots.tolist(), tokens.tolist(), strict=True):
                follower = self._slots.get(slot)
                if follower is not None and not follower.follow(token):
                    del self._slots[slot]
                    if follower.error:
                        errors[slot] = follower.error
                        _LOG.warning("slot %d: %s", slot, follower.error)
        return errors

    # ----------------------------------------------------------------- in the pool's thread

    def _build(self, grammar: str, emitted: list[int]) -> LLMatcher:
        matcher: LLMatcher = self._compiled(grammar).deep_copy()
        if not matcher.consume_tokens(emitted):
            raise ValueError(f"the tokens emitted so far do not follow the grammar: {reason_of(matcher)}")
        return matcher

    def _compile(self, grammar: str) -> LLMatcher:
        matcher = new_matcher(self._vocabulary, grammar)
        if matcher.is_error():
            raise ValueError(reason_of(matcher))
        return matcher


class _Follower:
    """The matcher of one slot. ``error`` says why it cannot go on; empty while it can."""

    def __init__(self, slot: int, matcher: LLMatcher, stop_ids: Int32, vocabulary: LLTokenizer) -> None:
        self.slot = slot
        self.error = ""
        self._matcher = matcher
        self._stops = _bits_of(stop_ids.tolist(), vocabulary.vocab_size)
        self._ends = ~_bits_of(vocabulary.eos_tokens, vocabulary.vocab_size)
        self._stop_ids = frozenset(stop_ids.tolist())

    def fill(self, bits_W: Bits) -> None:
        """Sets a bit for each allowed token. The request's stop ids are allowed where the grammar
        may end. Where no token is allowed, there is an error, and any token will do.
        """
        fill_next_token_bitmask(self._matcher, bits_W[None], 0)
        bits_W &= self._ends
        if self._matcher.is_accepting():
            bits_W |= self._stops
        if self._matcher.is_error() or not bits_W.any():
            self.error = f"no token follows the grammar here; {reason_of(self._matcher)}".rstrip("; ")
            bits_W[:] = -1

    def follow(self, token: int) -> bool:
        """Advances by a token. False when it ends the sequence, or there is an error."""
        if self.error or token in self._stop_ids:
            return False
        if not self._matcher.consume_token(token):
            self.error = (
                f"token {token} was allowed but does not follow the grammar; {reason_of(self._matcher)}"
            )
        return not self.error


def _bits_of(tokens: list[int], vocab_size: int) -> Bits:
    """Packed flags [W] with a bit for each of ``tokens``."""
    flags = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    flags[tokens] = 1
    return np.packbits(flags, bitorder="little").view(np.int32)
