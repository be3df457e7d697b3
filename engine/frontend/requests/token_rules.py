"""Tokens that a request favours or forbids: logit_bias, allowed_token_ids and bad_words."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import numpy as np

from ...text.tokenizer import Codec
from ..api.errors import ApiError, bad_request, shown
from ..api.schemas import GenerationRequest
from .stops import StopRule

# Both travel with the plan that admits a request, whose message is to stay small.
MAX_RANGES = 512
MAX_BAD_TOKENS = 2048
MAX_NAMED = 10  # ids or keys that an error names

_END = -1


@dataclass(frozen=True, slots=True)
class TokenRules:
    """The rules as ``Sampling`` has them."""

    bias_ids_i32: bytes = b""
    bias_values_f32: bytes = b""
    allowed_i32: bytes = b""
    bad_words_i32: bytes = b""


def token_rules(ask: GenerationRequest, codec: Codec, vocab_size: int, stop: StopRule) -> TokenRules:
    """The rules of a request. Raises ApiError for ids outside the vocabulary, and where no token
    would be left.
    """
    ids, values = _biases(ask.logit_bias, vocab_size)
    allowed = sorted(set(ask.allowed_token_ids or ()))
    check_ids(allowed, vocab_size, "allowed_token_ids")
    words = _bad_words(ask.bad_words or [], codec, vocab_size)
    if allowed or words:
        forbidden = {word[-1] for word in words} | (stop.ids if ask.min_tokens else set())
        _check_choice(allowed, forbidden, vocab_size)
    return TokenRules(
        bias_ids_i32=np.array(ids, "<i4").tobytes(),
        bias_values_f32=np.array(values, "<f4").tobytes(),
        allowed_i32=_ranges(allowed),
        bad_words_i32=array("i", [token for word in words for token in (*word, _END)]).tobytes(),
    )


def refuse_with_grammar(ask: GenerationRequest) -> None:
    """Refuses rules that could leave no token which a grammar allows."""
    for name, value in (("allowed_token_ids", ask.allowed_token_ids), ("bad_words", ask.bad_words)):
        if value:
            raise bad_request(
                f"{name} cannot be combined with structured outputs or a forced tool call", name
            )


def check_ids(ids: list[int], vocab_size: int, param: str) -> None:
    """Raises ApiError where ids are outside the vocabulary, naming the first of them."""
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        raise _outside([token for token in ids if not 0 <= token < vocab_size], vocab_size, param)


def check_prompt(ids: list[int], codec: Codec, vocab_size: int, param: str) -> None:
    """Raises ApiError where a text has a token for which the model has no embedding."""
    if max(ids, default=0) >= vocab_size:
        token = next(token for token in ids if token >= vocab_size)
        raise bad_request(
            f"{param}: the token {shown(codec.token_name(token))} (id {token}) is outside the model's"
            f" vocabulary of {vocab_size} ids (0 to {vocab_size - 1})",
            param,
        )


def _biases(biases: dict[str, float] | None, vocab_size: int) -> tuple[list[int], list[float]]:
    """Token ids, ascending, and their biases."""
    pairs: dict[int, float] = {}
    wrong = []
    for key, value in (biases or {}).items():
        if key.isascii() and key.isdigit() and len(key) < 12 and int(key) < vocab_size:
            pairs[int(key)] = value
        else:
            wrong.append(repr(key[:40]))
    if wrong:
        raise bad_request(
            f"logit_bias: keys must be token ids from 0 to {vocab_size - 1} (got {_listed(wrong)})",
            "logit_bias",
        )
    ids = sorted(pairs)
    return ids, [pairs[token] for token in ids]


def _bad_words(words: list[str], codec: Codec, vocab_size: int) -> list[tuple[int, ...]]:
    """Token sequences that must not be written: each word at the start of a text and behind a
    space.
    """
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        bare = word.lstrip() or word
        for text in (bare, f" {bare}"):
            ids = codec.encode(text, False)
            check_prompt(ids, codec, vocab_size, "bad_words")
            if ids:
                found[tuple(ids)] = None
    num_tokens = sum(map(len, found))
    if num_tokens > MAX_BAD_TOKENS:
        raise bad_request(
            f"bad_words: the words have {num_tokens} tokens, with and without a space in front; at most"
            f" {MAX_BAD_TOKENS} are allowed",
            "bad_words",
        )
    return list(found)


def _check_choice(allowed: list[int], forbidden: set[int] | frozenset[int], vocab_size: int) -> None:
    """Refuses a request that might leave no token to choose at some position."""
    left = set(allowed) - forbidden if allowed else vocab_size - len(forbidden) > 0
    if not left:
        param = "allowed_token_ids" if allowed else "bad_words"
        raise bad_request(
            f"{param}: bad_words and min_tokens together forbid every token"
            " (min_tokens forbids the end of the text)",
            param,
        )


def _ranges(ids: list[int]) -> bytes:
    """The first and the last id of each run of ``ids``, which ascend."""
    if not ids:
        return b""
    values = np.array(ids, "<i4")
    breaks = np.flatnonzero(np.diff(values) != 1)
    if len(breaks) + 1 > MAX_RANGES:
        raise bad_request(
            f"allowed_token_ids: the ids form {len(breaks) + 1} separate runs; at most {MAX_RANGES} are"
            " allowed",
            "allowed_token_ids",
        )
    firsts = values[np.concatenate([[0], breaks + 1])]
    lasts = values[np.concatenate([breaks, [len(values) - 1]])]
    return np.stack([firsts, lasts], 1).tobytes()


def _outside(tokens: list[int], vocab_size: int, param: str) -> ApiError:
    named = [str(token) if abs(token) < 10**18 else "a huge number" for token in tokens[:MAX_NAMED]]
    are = "token id {} is" if len(tokens) == 1 else "token ids {} are"
    listed = _listed(named, len(tokens))
    return bad_request(
        f"{param}: {are.format(listed)} outside the vocabulary of {vocab_size} ids (0 to {vocab_size - 1})",
        param,
    )


def _listed(names: list[str], total: int | None = None) -> str:
    """The first few of ``names``, and how many there are in all."""
    total = len(names) if total is None else total
    listed = ", ".join(names[:MAX_NAMED])
    return listed if total <= MAX_NAMED else f"{listed} and {total - MAX_NAMED} more"
