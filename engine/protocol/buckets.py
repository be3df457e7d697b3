"""Buckets of a section's tokens: steps have few shapes, which can be measured and captured."""

from __future__ import annotations

import numpy as np

from .arrays import Int64

_BUCKETS = np.array(
    [0, 1, 2, 4, *range(8, 64, 8), *range(64, 256, 32), *range(256, 1024, 128), *range(1024, 1 << 20, 1024)]
)


def bucket_of(num_tokens: Int64) -> Int64:
    """The smallest bucket that holds each number of tokens."""
    return _BUCKETS[_BUCKETS.searchsorted(num_tokens)]


def bucket_over(num_tokens: int) -> int:
    """The smallest bucket that holds a number of tokens."""
    return int(bucket_of(np.array([num_tokens]))[0])
