"""Terms of the checksum over page tables and lengths."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...kernels.splitmix import mix64
from .arrays import Int64


def page_terms(slots: Int64, indices: Int64, pages: Int64) -> NDArray[np.uint64]:
    """Checksum terms of page-table entries (slot, index in the table, page), summed modulo 2^64."""
    key: NDArray[np.uint64] = (slots.astype(np.uint64) << np.uint64(48)) ^ (
        indices.astype(np.uint64) << np.uint64(28)
    )
    return mix64(key ^ pages.astype(np.uint64))


def length_terms(slots: Int64, lengths: Int64) -> NDArray[np.uint64]:
    """Checksum terms of active slots, summed modulo 2^64."""
    key: NDArray[np.uint64] = (slots.astype(np.uint64) << np.uint64(48)) ^ lengths.astype(np.uint64)
    return mix64(key ^ np.uint64(0xA5A5 << 40))
