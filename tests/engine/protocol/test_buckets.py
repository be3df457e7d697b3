"""Buckets of tokens: the smallest that holds a number, and the bound on half of a step."""

from __future__ import annotations

import pytest

from lockstep.engine.protocol.buckets import bucket_over, most_tokens


@pytest.mark.parametrize(
    ("tokens", "bucket"), [(0, 0), (3, 4), (5, 8), (57, 64), (65, 96), (1000, 1024), (1025, 2048)]
)
def test_the_smallest_bucket_holds_a_number_of_tokens(tokens: int, bucket: int) -> None:
    assert bucket_over(tokens) == bucket == bucket_over(bucket)


def test_the_bound_of_a_microbatch_holds_half_of_the_tokens_and_some_more() -> None:
    for capacity in range(1, 3000):
        assert -(-capacity // 2) <= most_tokens(capacity) <= min(capacity, 0.625 * capacity + 1)
