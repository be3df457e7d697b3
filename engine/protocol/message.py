"""The base of all messages, and the values that several kinds of message carry."""

from __future__ import annotations

from enum import IntEnum

import msgspec

HASH_BYTES = 16

encode = msgspec.msgpack.Encoder().encode


class Message(msgspec.Struct, array_like=True, gc=False, frozen=True):
    """Base of every message: an immutable msgpack array."""


class Sampling(Message, frozen=True):
    """Sampling parameters of one request; the frontend has checked them.

    ``temperature`` 0 is greedy; ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 are off. ``num_logprobs``
    is -1 for none, 0 for the chosen token alone, n for the top n beside it;
    ``num_prompt_logprobs`` is the same for every prompt token but the first. ``stop_i32`` are the
    ids that end the sequence (end-of-sequence ids unless the request ignores them); they are masked
    until ``min_tokens`` have been sampled.

    ``allowed_i32`` are ranges of ids, first and last of each: no other id may be sampled; empty
    allows all. ``bad_words_i32`` are token sequences, each ended by -1: the last token of one may
    not follow its others among the output. ``prompt_ranks``: the ranks of prompt tokens are wanted
    beside their log-probabilities.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    min_tokens: int = 0
    num_logprobs: int = -1
    stop_i32: bytes = b""
    bias_ids_i32: bytes = b""
    bias_values_f32: bytes = b""
    num_prompt_logprobs: int = -1
    allowed_i32: bytes = b""
    bad_words_i32: bytes = b""
    prompt_ranks: bool = False


class Stop(Message, tag="stop", frozen=True):
    """Asks a process to end cleanly: finish the step, close sockets, exit 0."""

    reason: str = ""


class Finish(IntEnum):
    """The reason why a request ended; 0 while it runs."""

    NONE = 0
    STOP = 1
    LENGTH = 2
    ABORT = 3
    ERROR = 4
