"""Log-probabilities of a prompt's own tokens, from the hidden states of a chunk of it.

T tokens of the chunk, D hidden, K likeliest
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..models.decoder import Model
from ..protocol.arrays import Int32
from ..protocol.results import PromptLogprobs

# Logits of a slice of a chunk, in float32: of a vocabulary of 152,000 that is 110 tokens. A chunk
# of 8,192 would be 5 GB.
_SLICE_BYTES = 64 << 20


@dataclass(frozen=True)
class Chunk:
    """Which tokens are scored: ``number`` is the chunk's place in the section, next_T int32 the
    tokens from ``position`` on, of which row ``first`` of the step's hidden states and those after
    it are to predict one each. K is ``num_top``.
    """

    number: int
    position: int
    first: int
    next_T: Int32
    num_top: int


def score(model: Model, hidden_TD: Tensor, chunk: Chunk) -> PromptLogprobs:
    """The model's own log-probabilities of the chunk's tokens, a bounded slice of logits at a
    time.
    """
    width = max(1, _SLICE_BYTES // (4 * model.config.vocab_size))
    next_T = torch.from_numpy(chunk.next_T.astype(np.int64)).to(hidden_TD.device)
    hidden_TD = hidden_TD[chunk.first : chunk.first + len(next_T)]
    slices = [
        model.ops.logprobs(model.logits(part_TD), part_T, chunk.num_top)
        for part_TD, part_T in zip(hidden_TD.split(width), next_T.split(width), strict=True)
    ]
    chosen_T, ids_TK, values_TK = (torch.cat(parts).cpu().numpy() for parts in zip(*slices, strict=True))
    ids_i32 = ids_TK.astype(np.int32).tobytes()
    return PromptLogprobs(chunk.number, chunk.position, chosen_T.tobytes(), ids_i32, values_TK.tobytes())
