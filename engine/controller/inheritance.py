"""The part of a controller's state that ranks have kept from the one before it."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ...parallel.mesh import Mesh
from ..protocol.arrays import Int64
from ..protocol.bulk import Published, RankHello
from ..protocol.message import HASH_BYTES


class Heir(Protocol):
    """Takes over the blocks of a data index: pages (int32) and their hashes."""

    def adopt(self, data: int, pages_i32: bytes, hashes_h128: bytes) -> None: ...


class Inheritance:
    """Collects the hellos of ranks and the blocks that each says it holds. ``epoch`` is the last
    one that the launcher knows of, -1 for the first controller of a run.
    """

    def __init__(self, epoch: int = -1) -> None:
        self.hellos: dict[int, RankHello] = {}
        self._epoch = epoch
        self._published: dict[int, Published] = {}

    def published(self, message: Published) -> None:
        """The hello of the same rank follows."""
        self._published[message.rank] = message

    def hello(self, hello: RankHello) -> None:
        """A rank is here. One that has entered no epoch holds no block."""
        self.hellos[hello.rank] = hello
        if hello.epoch < 0:
            self._published.pop(hello.rank, None)

    def lost(self, rank: int) -> None:
        self.hellos.pop(rank, None)
        self._published.pop(rank, None)

    @property
    def placement_version(self) -> int:
        """The newest placement that a rank has; 0 for that of the start."""
        return max((hello.placement_version for hello in self.hellos.values()), default=0)

    @property
    def placement_i32(self) -> bytes:
        """The newest placement, as in ``ControllerSpec``; empty for that of the start."""
        return max(self.hellos.values(), key=lambda hello: hello.placement_version).placement_i32

    def take_behind(self) -> list[int]:
        """Ranks without the newest placement, whose hellos no longer count."""
        newest = self.placement_version
        behind = [rank for rank, hello in self.hellos.items() if hello.placement_version < newest]
        for rank in behind:
            del self.hellos[rank]
        return behind

    @property
    def first_epoch(self) -> int:
        """The first epoch that no rank refuses."""
        return max([self._epoch, *(hello.epoch for hello in self.hellos.values())]) + 1

    def hand_over(self, mesh: Mesh, num_pages: list[int], heir: Heir) -> int:
        """Gives ``heir`` the blocks that all ranks of a data index hold in the same page below
        ``num_pages`` [data]. Returns their number.
        """
        total = 0
        for data, size in enumerate(num_pages):
            held = [self._published.get(rank) for rank in mesh.members(data)]
            pages, hashes = _common([blocks for blocks in held if blocks is not None], size)
            if len(pages) and all(blocks is not None for blocks in held):
                heir.adopt(data, pages.astype(np.int32).tobytes(), hashes.tobytes())
                total += len(pages)
        self._published.clear()
        return total


def _common(held: list[Published], size: int) -> tuple[Int64, NDArray[np.uint8]]:
    """Pages [n] below ``size`` that all of ``held`` name with the same hash, and the hashes
    [n, 16].
    """
    known = np.full(size, len(held) > 0)
    first = np.zeros((size, HASH_BYTES), np.uint8)
    for index, blocks in enumerate(held):
        pages = np.frombuffer(blocks.pages_i32, np.int32)
        inside = pages < size
        hashes = np.zeros((size, HASH_BYTES), np.uint8)
        hashes[pages[inside]] = np.frombuffer(blocks.hashes_h128, np.uint8).reshape(-1, HASH_BYTES)[inside]
        here = np.zeros(size, np.bool_)
        here[pages[inside]] = True
        first = hashes if index == 0 else first
        known &= here & (hashes == first).all(1)
    found = np.flatnonzero(known)
    return found, first[found]
