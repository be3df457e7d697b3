"""Sizes of the low-latency kernels of NCCL EP (package ``nccl-extensions`` 0.1), and of their
memory. No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass

HIDDEN_STEP = 512
"""Hidden sizes are multiples: vectors of a warp, and 16 bytes of scales."""

MOST_CHOICES = 21
"""Choices of a token, each with a warp, however many slots share the warps of a multiprocessor."""

MOST_RANKS = 64
"""Ranks, in its release notes."""


@dataclass(frozen=True)
class MemoryShape:
    """Sizes of the memory. ``num_slots``: of all ranks, W x S. ``capacity``: most tokens of a rank
    in a step.
    """

    num_slots: int
    top_k: int
    capacity: int
    hidden: int

    @property
    def token_bytes(self) -> int:
        """Bytes of a token there, with its scales, and of an output: as much as in bf16."""
        return 2 * self.hidden

    def num_bytes(self, size: int) -> int:
        """Bytes of a rank's memory among ``size`` ranks, flags aside: two halves, each with room
        for tokens or for outputs, to be sent and received.
        """
        token = -(-(4 + 2 * self.top_k) // 16) * 16 + self.token_bytes
        output = self.token_bytes + 4 * (self.hidden // 128)
        return 2 * self.capacity * max((1 + size) * token, (self.num_slots + self.top_k) * output)
