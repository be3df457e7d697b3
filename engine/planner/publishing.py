"""Block hashes to be sent to ranks, from which a new controller can rebuild its index."""

from __future__ import annotations

import numpy as np

from ..kv.block_index import BlockIndex
from ..protocol.arrays import Int64, UInt64

_Blocks = tuple[Int64, UInt64, Int64]
"""Equally long vectors: data indices [n], keys [n, 2], global pages [n]."""


class Publishing:
    """Collects blocks as plans write them, until the next plan carries them to their ranks."""

    def __init__(self, index: BlockIndex) -> None:
        self._index = index
        self._blocks: list[_Blocks] = []

    def add(self, data: Int64, keys: UInt64, pages: Int64) -> None:
        """Adds blocks ``keys`` [n, 2], held in ``pages`` [n] of ``data`` [n]."""
        self._blocks.append((data, keys, pages))

    def take(self) -> _Blocks | None:
        """Blocks since the last call that are still in the index, data indices ascending."""
        if not self._blocks:
            return None
        data, keys, pages = (np.concatenate(parts) for parts in zip(*self._blocks, strict=True))
        self._blocks.clear()
        valid = self._index.names(data, keys, pages).nonzero()[0]
        valid = valid[data[valid].argsort(kind="stable")]
        return data[valid], keys[valid], pages[valid]

    def forget(self, data: int) -> None:
        """Drops blocks of ``data`` that have left the index."""
        kept = []
        for owners, keys, pages in self._blocks:
            still = (owners != data) | self._index.names(owners, keys, pages)
            kept.append((owners[still], keys[still], pages[still]))
        self._blocks = kept
