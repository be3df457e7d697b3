"""Sampling settings of each sequence slot in arrays, and their rows for a step.

Suffixes: R rows that sample in a step, N entries of a list over rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ...kernels.reference.sampling import (
    MIN_TEMPERATURE,
    NO_PENALTIES,
    LogitEdits,
    SamplingParams,
    token_counts,
)
from ..protocol.arrays import Int32, Int64
from ..protocol.message import Sampling
from .bad_words import BadWords

_T = TypeVar("_T", bound=np.generic)

_NO_TOKEN = -1


class _Seen:
    """The distinct tokens of one slot, and how often each was sampled: 0 for a token of the prompt
    alone.
    """

    def __init__(self, history: Int32, prompt_length: int) -> None:
        tokens, counts = token_counts(history, prompt_length)
        self._size = len(tokens)
        self._tokens, self._counts = tokens, counts
        self._index = {token: at for at, token in enumerate(tokens.tolist())}

    @property
    def tokens(self) -> Int64:
        return self._tokens[: self._size]

    @property
    def counts(self) -> Int64:
        return self._counts[: self._size]

    def add(self, token: int) -> None:
        at = self._index.setdefault(token, self._size)
        if at == self._size:
            if at == len(self._tokens):
                self._tokens = np.concatenate([self._tokens, np.zeros(at + 16, np.int64)])
                self._counts = np.concatenate([self._counts, np.zeros(at + 16, np.int64)])
            self._tokens[at], self._counts[at] = token, 0
            self._size += 1
        self._counts[at] += 1


@dataclass
class _Edits:
    """Changes to the logits of one slot, apart from min_tokens. ``seen`` is None without
    penalties, ``bad_words`` where nothing is forbidden.
    """

    bias_tokens: Int64
    bias_values: NDArray[np.float32]
    seen: _Seen | None
    bad_words: BadWords | None

    @property
    def follow(self) -> bool:
        """Whether they follow from the tokens that were sampled."""
        return self.seen is not None or self.bad_words is not None


@dataclass(frozen=True)
class RowSettings:
    """The settings of rows [R].

    ``asked`` are the rows that want log-probabilities. ``open_from`` is the first position at which
    a row may sample its stop ids. ``stop`` [R, n] holds those ids, padded with -1. ``allowed`` are
    the rows that may sample some tokens only, and a bit for each of those, as ``allow_only`` takes
    them; None where all rows are free.
    """

    slots: Int64
    params: SamplingParams
    seed: Int64
    num_logprobs: Int64
    asked: Int64
    open_from: Int64
    stop: Int64
    allowed: tuple[Int64, NDArray[np.int32]] | None


class SlotSettings:
    """Settings by slot. ``first_output`` is the position of a slot's first output token, and the
    length of the request's own prompt. ``num_prompt_logprobs`` and ``prompt_ranks`` are as in
    ``Sampling``. ``vocab_size`` is the width of the logits. ``counts_tokens``: for penalties; else
    somebody else does, and applies them.
    """

    def __init__(self, num_slots: int, vocab_size: int, counts_tokens: bool = True) -> None:
        self._vocab_size, self._counts_tokens = vocab_size, counts_tokens
        self._seed = np.zeros(num_slots, np.int64)
        self._num_logprobs = np.full(num_slots, -1, np.int64)
        self.num_prompt_logprobs = np.full(num_slots, -1, np.int64)
        self.prompt_ranks = np.zeros(num_slots, np.bool_)
        self.first_output = np.zeros(num_slots, np.int64)
        self._temperature = np.zeros(num_slots, np.float32)
        self._top_k = np.zeros(num_slots, np.int64)
        self._top_p = np.ones(num_slots, np.float32)
        self._min_p = np.zeros(num_slots, np.float32)
        self._min_tokens = np.zeros(num_slots, np.int64)
        self._penalties = np.zeros((num_slots, 3), np.float32)
        self._stop = np.full((num_slots, 1), _NO_TOKEN, np.int64)
        self._edits: dict[int, _Edits] = {}
        self._allowed: dict[int, NDArray[np.int32]] = {}
        self._free = np.zeros(num_slots, np.bool_)
        self._follows = np.zeros(num_slots, np.bool_)
        self._unaided = np.zeros(num_slots, np.bool_)
        self._plain = np.zeros(num_slots, np.bool_)
        self._rows: RowSettings | None = None

    def admit(
        self, slot: int, sampling: Sampling, history: Int32, num_emitted: int, grammar: bool = False
    ) -> None:
        """Sets a slot up for a request, which may have a ``grammar``. Its ``history`` ends with the
        ``num_emitted`` tokens that it has sampled so far.
        """
        self._seed[slot] = sampling.seed
        self._num_logprobs[slot] = sampling.num_logprobs
        self.num_prompt_logprobs[slot] = sampling.num_prompt_logprobs
        self.prompt_ranks[slot] = sampling.prompt_ranks
        self.first_output[slot] = len(history) - num_emitted
        self._temperature[slot] = sampling.temperature
        self._top_k[slot] = sampling.top_k
        self._top_p[slot] = sampling.top_p
        self._min_p[slot] = sampling.min_p
        self._min_tokens[slot] = sampling.min_tokens
        penalties = (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty)
        self._penalties[slot] = penalties
        self._set_stop(slot, np.frombuffer(sampling.stop_i32, np.int32))
        self._set_edits(slot, sampling, history, len(history) - num_emitted)
        self._allowed.pop(slot, None)
        if sampling.allowed_i32:
            self._allowed[slot] = _bits(np.frombuffer(sampling.allowed_i32, np.int32), self._vocab_size)
        free = (
            slot not in self._edits and slot not in self._allowed and not grammar and not sampling.min_tokens
        )
        self._free[slot] = free
        edits = self._edits.get(slot)
        self._follows[slot] = grammar or (edits is not None and edits.follow)
        self._unaided[slot] = free and sampling.num_logprobs < 0
        self._plain[slot] = self._unaided[slot] and sampling.temperature < MIN_TEMPERATURE
        self._rows = None

    def follows(self, slots: Int64) -> bool:
        """Whether the logits of some of these rows are changed by tokens that ``observe`` or a
        grammar has to take first.
        """
        return bool(self._follows[slots].any())

    def free(self, slots: Int64) -> NDArray[np.bool_]:
        """The rows [R] that draw from the model's own logits."""
        return self._free[slots]

    def unaided(self, slots: Int64) -> NDArray[np.bool_]:
        """The rows [R] that draw from the model's own logits, and ask for nothing else."""
        return self._unaided[slots]

    def plain(self, slots: Int64) -> NDArray[np.bool_]:
        """The rows [R] that take the most likely token of the model, and ask for nothing else."""
        return self._plain[slots]

    def rows(self, slots: Int64) -> RowSettings:
        """The settings of rows [R]: the same object until rows or admissions change."""
        if self._rows is None or self._rows.slots.tobytes() != slots.tobytes():
            num_logprobs = self._num_logprobs[slots]
            self._rows = RowSettings(
                slots=slots,
                params=SamplingParams(
                    self._temperature[slots], self._top_k[slots], self._top_p[slots], self._min_p[slots]
                ),
                seed=self._seed[slots],
                num_logprobs=num_logprobs,
                asked=np.flatnonzero(num_logprobs >= 0),
                open_from=self.first_output[slots] + self._min_tokens[slots],
                stop=self._stop[slots],
                allowed=self._allowed_of(slots),
            )
        return self._rows

    def edits(self, rows: RowSettings, positions: Int64) -> LogitEdits | None:
        """Changes to the logits of rows [R] that sample ``positions`` [R]; None when there are
        none.
        """
        early = positions < rows.open_from
        if not self._edits and not early.any():
            return None
        found = [
            (row, self._edits[slot]) for row, slot in enumerate(rows.slots.tolist()) if slot in self._edits
        ]
        seen = [(row, edits.seen) for row, edits in found if edits.seen is not None]
        masked = np.where(early[:, None], rows.stop, _NO_TOKEN)
        masked_rows, column = np.nonzero(masked != _NO_TOKEN)
        bad = [(row, edits.bad_words.forbidden) for row, edits in found if edits.bad_words is not None]
        penalties = self._penalties[rows.slots]
        return LogitEdits(
            counted_rows_N=_repeat([row for row, _ in seen], [len(part.tokens) for _, part in seen]),
            counted_tokens_N=_join([part.tokens for _, part in seen], np.int64),
            output_counts_N=_join([part.counts for _, part in seen], np.int64),
            repetition_R=penalties[:, 0],
            presence_R=penalties[:, 1],
            frequency_R=penalties[:, 2],
            bias_rows_N=_repeat([row for row, _ in found], [len(edits.bias_tokens) for _, edits in found]),
            bias_tokens_N=_join([edits.bias_tokens for _, edits in found], np.int64),
            bias_values_N=_join([edits.bias_values for _, edits in found], np.float32),
            masked_rows_N=_join(
                [masked_rows, _repeat([row for row, _ in bad], [len(part) for _, part in bad])], np.int64
            ),
            masked_tokens_N=_join([masked[masked_rows, column], *(part for _, part in bad)], np.int64),
        )

    def observe(self, slots: Int64, tokens: Int64) -> None:
        """Takes the tokens sampled in rows [R] where penalties or bad words need them."""
        if self._edits:
            for slot, token in zip(slots.tolist(), tokens.tolist(), strict=True):
                edits = self._edits.get(slot)
                if edits is None:
                    continue
                if edits.seen is not None:
                    edits.seen.add(token)
                if edits.bad_words is not None:
                    edits.bad_words.add(token)

    def _set_edits(self, slot: int, sampling: Sampling, history: Int32, num_prompt: int) -> None:
        """Keeps the changes to a slot's logits, if its request asks for any."""
        self._edits.pop(slot, None)
        penalised = tuple(self._penalties[slot].tolist()) != NO_PENALTIES
        if penalised or sampling.bias_ids_i32 or sampling.bad_words_i32:
            bad_words = np.frombuffer(sampling.bad_words_i32, np.int32)
            self._edits[slot] = _Edits(
                np.frombuffer(sampling.bias_ids_i32, np.int32).astype(np.int64),
                np.frombuffer(sampling.bias_values_f32, np.float32),
                _Seen(history, num_prompt) if penalised and self._counts_tokens else None,
                BadWords(bad_words, history[num_prompt:]) if len(bad_words) else None,
            )

    def _allowed_of(self, slots: Int64) -> tuple[Int64, NDArray[np.int32]] | None:
        """The rows among ``slots`` that may sample some tokens only, and those tokens' bits."""
        rows = (
            [row for row, slot in enumerate(slots.tolist()) if slot in self._allowed] if self._allowed else []
        )
        if not rows:
            return None
        return np.array(rows, np.int64), np.stack([self._allowed[slot] for slot in slots[rows].tolist()])

    def _set_stop(self, slot: int, stop: Int32) -> None:
        missing = len(stop) - self._stop.shape[1]
        if missing > 0:
            self._stop = np.pad(self._stop, ((0, 0), (0, missing)), constant_values=_NO_TOKEN)
        self._stop[slot] = _NO_TOKEN
        self._stop[slot, : len(stop)] = stop


def _bits(ranges: Int32, vocab_size: int) -> NDArray[np.int32]:
    """A bit for each token of ``ranges``, first and last of each, in words of 32."""
    flags = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    for first, last in ranges.reshape(-1, 2).tolist():
        flags[first : last + 1] = 1
    return np.packbits(flags, bitorder="little").view(np.int32)


def _repeat(rows: list[int], counts: list[int]) -> Int64:
    return np.repeat(np.asarray(rows, np.int64), counts)


def _join(parts: list[NDArray[_T]], dtype: type[_T]) -> NDArray[_T]:
    return np.concatenate(parts) if parts else np.zeros(0, dtype)
