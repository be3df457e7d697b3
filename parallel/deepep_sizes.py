"""Sizes of DeepEP's low-latency kernels (package ``sgl-deep-ep`` 0.1.2), and of their memory. No
torch here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

HIDDEN_SIZES = (2048, 2560, 3072, 3584, 4096, 5120, 6144, 7168, 8192)
"""Hidden sizes for which there are kernels; each a multiple of 512, as FP8 needs it."""

MOST_CHOICES = 16
"""Choices of a token."""

MOST_TOKENS = 511
"""Tokens of a rank in a step: each takes two places of the 1,024 in a queue of NVSHMEM, and two
stay free.
"""

NODE_RANKS = 8
"""Ranks are fewer than so many, or a multiple of them."""


@dataclass(frozen=True)
class BufferShape:
    """Sizes of the memory. ``num_slots``: of all ranks, W x S. ``capacity``: most tokens of a rank
    in a step.
    """

    num_slots: int
    capacity: int
    hidden: int

    def num_bytes(self, size: int) -> int:
        """Bytes of a rank's memory among ``size`` ranks, flags aside: two halves, each to send the
        outputs of all slots and to receive them, or tokens.
        """
        output = 2 * self.hidden + 4 * (self.hidden // 128)
        rows = self.num_slots * rounded_capacity(self.capacity, size)
        return 2 * rows * (output + max(output, 2 * self.hidden + 16))


def rounded_capacity(capacity: int, size: int) -> int:
    """A capacity with which the rows of a slot, ``size`` times as many, are a multiple of 4, as
    products with scales need it.
    """
    step = 4 // math.gcd(4, size)
    return max(1, -(-capacity // step)) * step
