"""A 64-bit mixer for counter-based draws, checksums and hash tables. Imports no torch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ADD = np.uint64(0x9E3779B97F4A7C15)
TIMES = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
"""The constants of ``mix64``."""


def mix64(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The splitmix64 finaliser (Steele et al. 2014), elementwise."""
    value = value + ADD
    value = (value ^ (value >> np.uint64(30))) * TIMES[0]
    value = (value ^ (value >> np.uint64(27))) * TIMES[1]
    mixed: NDArray[np.uint64] = value ^ (value >> np.uint64(31))
    return mixed
