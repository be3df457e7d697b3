"""Buckets of a section's tokens: steps have few shapes, which can be measured and captured. No
numpy here: plans of capacity do without it.
"""

from __future__ import annotations

from bisect import bisect_left

BUCKETS: tuple[int, ...] = (
    *(0, 1, 2, 4),
    *range(8, 64, 8),
    *range(64, 256, 32),
    *range(256, 1024, 128),
    *range(1024, 1 << 20, 1024),
)


MOST_CAPTURED = 1024
"""Tokens of the largest step with prompts that a GPU captures."""


def bucket_over(num_tokens: int) -> int:
    """The smallest bucket that holds a number of tokens."""
    return BUCKETS[bisect_left(BUCKETS, num_tokens)]


def largest_captured(num_rows: int, most_tokens: int) -> int:
    """The largest step that a GPU captures: all rows decode, or prompts of a bounded number of
    tokens.
    """
    return max(bucket_over(num_rows), min(MOST_CAPTURED, bucket_over(most_tokens)))


def most_tokens(capacity: int) -> int:
    """The bound on the tokens of a microbatch, of a step of ``capacity``: a half, and an eighth
    more, so that the halves may differ in tokens where they take equally long.
    """
    return min(capacity, capacity // 2 + capacity // 8 + 1)
