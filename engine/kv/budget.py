"""The number of pages in a rank's pool. Ranks use it, and so do plans, which may have no torch."""

from __future__ import annotations

from dataclasses import dataclass

GPU_RESERVE_BYTES = 1 << 30
"""Kept free on a GPU for activations and libraries."""

_CPU_SHARE = 0.5  # prompts, activations and other processes need the rest
_GPU_SHARE = 0.97
"""Requests make steps of other sizes than those that were rehearsed, and memory comes in pieces.
Not measured on a card."""


@dataclass(frozen=True)
class PoolLimits:
    """Bounds of a page pool. ``memory``: bytes, None for a share of the free ones. ``max_tokens``:
    tokens of all requests that could ever run at once. ``claimed``: bytes of a GPU that are free
    while the pool is sized, and will not be: steps and their recordings take them, and experts on
    their way.
    """

    memory: int | None
    max_tokens: int
    claimed: int = 0

    def num_bytes(self, free: int, ranks: int, device: str) -> int:
        """Bytes of the pool when ``ranks`` share ``free`` bytes (a GPU belongs to one rank)."""
        if self.memory is not None:
            return self.memory
        if device == "cpu":
            return int(free * _CPU_SHARE / ranks)
        return int((free - self.claimed) * _GPU_SHARE - GPU_RESERVE_BYTES)

    def num_pages(self, num_bytes: int, page_bytes: int, page_size: int) -> int:
        """Pages of ``page_size`` tokens in ``num_bytes``; 0 when not one fits. Only a size that
        follows from free memory is cut to ``max_tokens``.
        """
        pages = max(0, num_bytes // page_bytes)
        return pages if self.memory is not None else min(pages, pages_for(self.max_tokens, page_size))


def pages_for(num_tokens: int, page_size: int) -> int:
    """Pages that hold ``num_tokens`` tokens of one request."""
    return -(-num_tokens // page_size)
