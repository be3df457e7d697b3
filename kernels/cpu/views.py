"""Arrays of a step as compiled kernels read them, over the same memory as its tensors.

All layers of a step ask for the same few. Each is made for the first layer and kept until the steps
after, since making one takes 0.3 us.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ..reference.paged import PagedBatch
from ..reference.rope import Angles

_STEPS = 2


@lru_cache(_STEPS)
def rows_of(batch: PagedBatch) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """``query_start_R1``, ``lengths_R`` and ``pages_RP``."""
    return batch.query_start_R1.numpy(), batch.lengths_R.numpy(), batch.pages_RP.numpy()


@lru_cache(_STEPS)
def writes_of(batch: PagedBatch) -> NDArray[np.int64]:
    """``write_T``."""
    positions: NDArray[np.int64] = batch.write_T.numpy()
    return positions


@lru_cache(_STEPS)
def angles_of(angles: Angles) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """``cos_T1F`` and ``sin_T1F``."""
    return angles.cos_T1F.numpy(), angles.sin_T1F.numpy()
