"""Messages from a rank about a step: its result, or the reason why there is none."""

from __future__ import annotations

from .message import Message


class RowLogprobs(Message, frozen=True):
    """Log-probabilities of one sampled token, the ``index``-th of its ``row`` in this step."""

    row: int
    index: int
    chosen: float
    top_ids_i32: bytes
    top_f32: bytes


class RowError(Message, frozen=True):
    """The reason why a ``row`` cannot go on: no token follows its grammar. Its token is none."""

    row: int
    reason: str


class PromptLogprobs(Message, tag="prompt", frozen=True):
    """Log-probabilities of prompt tokens from ``position`` (at least 1) on: one per token [n], and
    ids and values of the top alternatives [n, top]. ``ranks_i32`` [n], where asked for, are the
    places of the tokens in the vocabulary by log-probability, 1 for the most likely. From a rank,
    ``of`` is the chunk's index in ``extend``; to a frontend, it is the handle.

    A token takes 4 + 8 x top bytes, and 4 for its rank: 512 tokens with the top 5 are 22,551 bytes,
    more than a step's message may have, so ``engine/planner/prefill.py`` cuts the chunks of such
    prompts.
    """

    of: int
    position: int
    chosen_f32: bytes
    top_ids_i32: bytes
    top_f32: bytes
    ranks_i32: bytes = b""


class StepResult(Message, tag="result", frozen=True):
    """The result of a step on a rank.

    ``tokens_i32`` are ragged over the rows that sample, ``counts_u8`` the tokens per row (empty:
    one each). ``ended_i32`` are the rows whose last token is one of their stop ids. ``seconds`` is
    the time of the step on the rank, ``waited`` the part of it spent waiting in collectives,
    ``stalled`` the part of that for other pipeline stages.
    ``expert_i64`` are token counts [layer, own slot] and ``phases_f32`` the seconds in each of
    ``moe.phases``, both over all steps since a header last asked for them; otherwise empty.
    ``landed_i32`` are the ids of moves that have landed and are not committed. ``transports``, in
    the first step of an epoch: how this rank's groups exchange.
    """

    group: int
    epoch: int
    step: int
    rank: int
    tokens_i32: bytes = b""
    counts_u8: bytes = b""
    ended_i32: bytes = b""
    logprobs: tuple[RowLogprobs, ...] = ()
    landed_i32: bytes = b""
    copied_i32: bytes = b""
    checksum: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    expert_i64: bytes = b""
    phases_f32: bytes = b""
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()
    errors: tuple[RowError, ...] = ()
    stalled: float = 0.0
    transports: str = ""


class Refused(Message, tag="refused", frozen=True):
    """A rank could not follow the chain: it has executed ``last_step`` and received ``step``."""

    group: int
    epoch: int
    rank: int
    last_step: int
    step: int


class Abandoned(Message, tag="abandoned", frozen=True):
    """A rank could not finish ``step`` because a peer did not answer. It waits for the next
    epoch.
    """

    group: int
    epoch: int
    rank: int
    step: int
    reason: str


FromRankStep = StepResult | Refused | Abandoned
