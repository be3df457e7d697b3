"""Changes of the block index as data, in the order they happened, for routers that mirror it."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from ..protocol.arrays import Int64, UInt64
from ..protocol.message import HASH_BYTES
from .request import Request


class BlocksStored(NamedTuple):
    """Consecutive blocks of one request that a data index holds from now on: their hashes end to
    end, and their tokens. ``parent`` is the hash of the block before the first, empty at the
    start of a prompt.
    """

    parent: bytes
    hashes_h128: bytes
    tokens_i32: bytes


class BlocksRemoved(NamedTuple):
    """Keys [n, 2] of blocks that a data index no longer holds."""

    keys: UInt64


Change = BlocksStored | BlocksRemoved


class IndexChanges:
    """Collects changes until ``take``."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._changes: list[Change] = []

    def stored(
        self, requests: list[Request], owners: Int64, blocks: Int64, later: list[bytes] | None = None
    ) -> None:
        """A data index holds blocks numbered ``blocks`` [n] of ``requests[owners]`` [n]; both
        ascend. ``later`` are tokens that requests do not list yet.
        """
        starts = np.flatnonzero((np.diff(owners) != 0) | (np.diff(blocks) != 1)) + 1
        edges = [0, *starts.tolist(), len(blocks)]
        for begin, end in pairwise(edges):
            if begin < end:
                owner = int(owners[begin])
                first = int(blocks[begin])
                tokens = later[owner] if later else b""
                self._changes.append(self._run(requests[owner], first, first + end - begin, tokens))

    def removed(self, keys: UInt64) -> None:
        """A data index no longer holds blocks ``keys`` [n, 2]."""
        self._changes.append(BlocksRemoved(keys))

    def take(self) -> list[Change]:
        """Changes since the last call."""
        changes, self._changes = self._changes, []
        return changes

    def _run(self, request: Request, first: int, end: int, later: bytes) -> BlocksStored:
        hashes, size = request.hashes_h128, self._page_size
        return BlocksStored(
            hashes[HASH_BYTES * max(0, first - 1) : HASH_BYTES * first],
            hashes[HASH_BYTES * first : HASH_BYTES * end],
            request.tokens_between(first * size, end * size, later),
        )
