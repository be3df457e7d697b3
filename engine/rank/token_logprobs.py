"""Log-probabilities of sampled tokens, as a result carries them."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ..protocol.arrays import Int64
from ..protocol.results import RowLogprobs


def logprob_lines(
    top: tuple[Tensor, Tensor, Tensor], numbers: Int64, num_top: Int64
) -> tuple[RowLogprobs, ...]:
    """Packs the result of the op ``logprobs`` for S rows: each row's token and its ``num_top`` [S]
    alternatives.
    """
    chosen, ids, values = (part.cpu().numpy() for part in top)
    ids = ids.astype(np.int32)
    return tuple(
        RowLogprobs(row, 0, float(chosen[at]), ids[at, :width].tobytes(), values[at, :width].tobytes())
        for at, (row, width) in enumerate(zip(numbers.tolist(), num_top.tolist(), strict=True))
    )
