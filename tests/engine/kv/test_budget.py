"""The number of pages in a pool."""

from __future__ import annotations

from lockstep.engine.kv.budget import GPU_RESERVE_BYTES, PoolLimits, pages_for


def test_an_explicit_size_is_taken_as_it_is() -> None:
    limits = PoolLimits(10_999, 32)
    assert limits.num_bytes(0, 4, "cpu") == limits.num_bytes(0, 1, "cuda") == 10_999
    assert limits.num_pages(10_999, 1000, 16) == 10


def test_auto_takes_a_share_of_free_memory() -> None:
    limits = PoolLimits(None, 10**9)
    assert [limits.num_bytes(100_000, ranks, "cpu") for ranks in (1, 4)] == [50_000, 12_500]
    assert limits.num_bytes(100 << 30, 1, "cuda") == (97 << 30) - GPU_RESERVE_BYTES
    steps = PoolLimits(None, 10**9, claimed=20 << 30)
    assert steps.num_bytes(120 << 30, 1, "cuda") == (97 << 30) - GPU_RESERVE_BYTES


def test_auto_gives_no_more_pages_than_requests_can_use_and_none_without_room() -> None:
    limits = PoolLimits(None, 33)
    assert limits.num_pages(12_500, 1000, 16) == 3
    assert limits.num_pages(999, 1000, 16) == 0
    assert limits.num_pages(limits.num_bytes(0, 1, "cuda"), 1000, 16) == 0


def test_a_request_takes_whole_pages() -> None:
    assert [pages_for(tokens, 16) for tokens in (0, 1, 16, 17)] == [0, 1, 1, 2]
