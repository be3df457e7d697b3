"""Array types and integer arithmetic that planner, ranks and messages share."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
UInt64 = NDArray[np.uint64]


def add64(first: int, second: int) -> int:
    """Sum modulo 2^64 (numpy warns when a scalar wraps)."""
    return (first + second) & 0xFFFF_FFFF_FFFF_FFFF


def ragged(counts: Int64) -> tuple[Int64, Int64]:
    """For lists of ``counts`` [n] elements laid end to end: each element's list, and its index in
    that list.
    """
    owners = np.arange(len(counts)).repeat(counts)
    return owners, np.arange(len(owners)) - (counts.cumsum() - counts)[owners]


def as_keys(hashes_h128: bytes) -> UInt64:
    """Packed hashes as uint64 [n, 2]."""
    return np.frombuffer(hashes_h128, "<u8").reshape(-1, 2)
