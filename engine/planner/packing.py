"""Vectors of a step, grouped by data index and packed as sections carry them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..protocol.arrays import Int64

SectionBytes = dict[int, bytes]
"""A field of sections, by the data indices that have values for it."""


def pack(data: Int64, values: NDArray[Any], num_data: int) -> SectionBytes:
    """The bytes of values [n, ...] that belong to data [n], which ascends."""
    packed = values.tobytes()
    size = values.itemsize * math.prod(values.shape[1:])
    cuts = (data.searchsorted(np.arange(num_data + 1)) * size).tolist()
    return {index: packed[start:end] for index, (start, end) in enumerate(pairwise(cuts)) if end > start}


def add_up(data: Int64, values: Int64, num_data: int) -> Int64:
    """Sums [D] of values [n] that belong to data [n]."""
    return np.bincount(data, values, minlength=num_data).astype(np.int64)


def i32(values: Sequence[int]) -> bytes:
    return np.array(values, np.int32).tobytes()


def pairs(first: Int64, second: Int64) -> NDArray[np.int32]:
    """Columns [n] as int32 [n, 2]."""
    return np.stack([first, second], axis=1).astype(np.int32)
