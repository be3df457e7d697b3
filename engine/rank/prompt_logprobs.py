"""Log-probabilities of a prompt's own tokens, from the hidden states of a chunk.

Suffixes: T tokens of the chunk, D hidden, K most likely tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...kernels.host_arrays import to_device
from ..protocol.arrays import Int32
from ..protocol.results import PromptLogprobs
from .parts import Parts
from .split_choice import split_logprobs

_SLICE_BYTES = 64 << 20
"""Bytes of float32 logits at once: 110 tokens of a vocabulary of 152,000. A chunk of 8,192 tokens
would take 5 GB."""


@dataclass(frozen=True)
class Chunk:
    """Prompt tokens to score: next_T int32, from ``position`` on. Each is predicted by one row of
    the step's hidden states, from row ``first`` on.

    ``number`` is the chunk's index in the section. K is ``num_top``. ``ranks``: the tokens' ranks
    are wanted.
    """

    number: int
    position: int
    first: int
    next_T: Int32
    num_top: int
    ranks: bool = False


def score(parts: Parts, hidden_TD: Tensor, chunk: Chunk) -> PromptLogprobs:
    """The model's log-probabilities of the chunk's tokens, computed in bounded slices of logits.
    All ranks of a tensor group make the same calls.
    """
    split = parts.splits.tensor.size
    width = max(1, _SLICE_BYTES * split // (4 * parts.model.config.vocab_size))
    next_T = to_device(chunk.next_T.astype(np.int64), hidden_TD.device)
    hidden_TD = hidden_TD[chunk.first : chunk.first + len(next_T)]
    slices = [
        score_slice(parts, part_TD, part_T, chunk.num_top, chunk.ranks)
        for part_TD, part_T in zip(hidden_TD.split(width), next_T.split(width), strict=True)
    ]
    chosen_T, ids_TK, values_TK, ranks_T = (
        torch.cat(found).cpu().numpy() for found in zip(*slices, strict=True)
    )
    return PromptLogprobs(
        of=chunk.number,
        position=chunk.position,
        chosen_f32=chosen_T.tobytes(),
        top_ids_i32=ids_TK.astype(np.int32).tobytes(),
        top_f32=values_TK.tobytes(),
        ranks_i32=ranks_T.astype(np.int32).tobytes(),
    )


_Scores = tuple[Tensor, Tensor, Tensor, Tensor]


def score_slice(parts: Parts, hidden_TD: Tensor, next_T: Tensor, num_top: int, ranks: bool) -> _Scores:
    """Log-probabilities of the tokens, the ids and values of the top K, and the tokens' ranks (none
    where they are not wanted). A token that ties with others has the best rank among them.
    """
    if parts.splits.tensor.size > 1:  # by what each part of the vocabulary says
        logits = parts.model.own_logits(hidden_TD)
        ranks_T = 1 + logits.num_above(next_T) if ranks else next_T[:0]
        return *split_logprobs(parts, logits, next_T, num_top), ranks_T
    logits_TV = parts.model.logits(hidden_TD)
    chosen_T, ids_TK, values_TK = parts.model.ops.logprobs(logits_TV, next_T, num_top)
    if not ranks:
        return chosen_T, ids_TK, values_TK, next_T[:0]
    return chosen_T, ids_TK, values_TK, 1 + (logits_TV > logits_TV.gather(-1, next_T[:, None])).sum(-1)
