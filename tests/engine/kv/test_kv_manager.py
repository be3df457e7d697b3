"""Pools, references and eviction of the KV manager."""

from __future__ import annotations

from itertools import accumulate, pairwise

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from lockstep.engine.kv.manager import KVManager
from lockstep.engine.protocol.arrays import Int64, as_keys

NONE = np.zeros(0, np.int64)


def chain(seed: int, length: int) -> bytes:
    return np.random.default_rng(seed).bytes(16 * length)


def reserve(manager: KVManager, data: int, shared: Int64, fresh: int) -> Int64 | None:
    """The pages of a reservation taken at once, None without room."""
    if not manager.reserve(data, shared, fresh):
        return None
    return np.concatenate([shared, manager.take_reserved()])


def release(manager: KVManager, *rows: tuple[int, Int64]) -> None:
    """Releases rows, each given by its data index and its pages."""
    data, pages = [data for data, _ in rows], [pages for _, pages in rows]
    manager.release(np.array(data), np.array([len(own) for own in pages]), np.concatenate(pages))


def cache(manager: KVManager, data: int, hashes: bytes) -> None:
    """Computes a prompt of full blocks and releases it."""
    keys = as_keys(hashes)
    pages = reserve(manager, data, NONE, len(keys))
    assert pages is not None
    manager.announce(np.full(len(keys), data), keys, pages)
    manager.mark_written(pages, 0)
    release(manager, (data, pages))


def test_computed_blocks_are_found_on_their_data_index_only() -> None:
    manager = KVManager([20, 20], 4)
    keys = chain(1, 6)
    cache(manager, 1, keys)
    assert manager.match([keys], [6]).tolist() == [[0, 6]]
    assert manager.match([keys], [4]).tolist() == [[0, 4]]
    assert len(manager.prefix(1, keys, 6)) == 6
    manager.check()


def test_eviction_takes_the_oldest_and_shortens_prefixes_from_their_end() -> None:
    manager = KVManager([100], 4)
    old, new = chain(1, 40), chain(2, 40)
    cache(manager, 0, old)
    cache(manager, 0, new)
    assert reserve(manager, 0, NONE, 30) is not None
    left = manager.match([old, new], [40, 40])[:, 0].tolist()
    assert left[1] == 40 or left[0] == 0, "the newer prefix lost blocks before the older was gone"
    assert left[0] < 40
    assert manager.prefix(0, old, left[0]).size == left[0], "a prefix has a hole"
    manager.check()


@pytest.mark.parametrize("count", [30, 100, 170])
def test_of_equally_old_pages_the_lowest_are_evicted(count: int) -> None:
    """Which ones numpy's ``argpartition`` takes depends on the kind of CPU."""
    manager = KVManager([200], 4)
    keys = np.concatenate([as_keys(chain(seed, 1)) for seed in range(200)])
    pages = reserve(manager, 0, NONE, 200)
    assert pages is not None
    manager.announce(np.zeros(200, np.int64), keys, pages)
    manager.mark_written(pages, 0)
    age_P = np.random.default_rng(0).permutation(np.repeat(np.arange(4), 50))
    for age in range(4):
        release(manager, *((0, page[None]) for page in pages[age_P[pages] == age]))
    assert reserve(manager, 0, NONE, count) is not None
    found = [manager.prefix(0, key.tobytes(), 1) for key in keys]
    left = {int(page) for each in found for page in each}
    assert set(range(200)) - left == set(np.argsort(age_P, kind="stable")[:count].tolist())
    manager.check()


def test_a_hit_makes_a_prefix_young_again() -> None:
    manager = KVManager([130], 4)
    first, second = chain(1, 60), chain(2, 60)
    cache(manager, 0, first)
    cache(manager, 0, second)
    shared = manager.prefix(0, first, 60)
    pages = reserve(manager, 0, shared, 0)
    assert pages is not None
    release(manager, (0, pages))
    assert reserve(manager, 0, NONE, 40) is not None
    assert manager.match([first], [60])[0, 0] == 60
    assert manager.match([second], [60])[0, 0] < 60


def test_referenced_pages_are_never_evicted() -> None:
    manager = KVManager([50], 4)
    held = reserve(manager, 0, NONE, 40)
    assert held is not None
    assert reserve(manager, 0, NONE, 11) is None
    assert reserve(manager, 0, NONE, 10) is not None
    assert manager.used().tolist() == [50]
    manager.check()


def test_a_shared_page_outlives_its_first_user() -> None:
    manager = KVManager([50], 4)
    keys = chain(1, 10)
    first = reserve(manager, 0, NONE, 10)
    assert first is not None
    manager.announce(np.zeros(10, np.int64), as_keys(keys), first)
    manager.mark_written(first, 0)
    second = reserve(manager, 0, first, 2)
    assert second is not None and second[:10].tolist() == first.tolist()
    release(manager, (0, first))
    assert manager.used().tolist() == [12]
    release(manager, (0, second))
    assert (manager.used().tolist(), manager.cached().tolist()) == ([0], [10])
    manager.check()


def test_a_page_shared_by_rows_that_end_together_is_kept_once() -> None:
    manager = KVManager([50, 50], 4)
    keys = chain(1, 10)
    first = reserve(manager, 0, NONE, 11)
    assert first is not None
    manager.announce(np.zeros(10, np.int64), as_keys(keys), first[:10])
    manager.mark_written(first, 0)
    second, other = reserve(manager, 0, first[:10], 3), reserve(manager, 1, NONE, 4)
    assert second is not None and other is not None
    release(manager, (0, first), (1, other), (0, second))
    assert (manager.used().tolist(), manager.cached().tolist()) == ([0, 0], [10, 0])
    assert [manager.available_on(data) for data in range(2)] == [50, 50]
    manager.check()


def test_a_page_released_twice_is_noticed() -> None:
    manager = KVManager([8], 4)
    pages = reserve(manager, 0, NONE, 2)
    assert pages is not None
    release(manager, (0, pages))
    with pytest.raises(AssertionError, match="released twice"):
        release(manager, (0, pages))


def test_unwritten_blocks_are_not_kept() -> None:
    manager = KVManager([8], 4)
    keys = chain(1, 3)
    pages = reserve(manager, 0, NONE, 3)
    assert pages is not None
    manager.announce(np.zeros(3, np.int64), as_keys(keys), pages)
    manager.mark_written(pages[:1], 7)
    release(manager, (0, pages))
    assert manager.match([keys], [3]).tolist() == [[1]]
    manager.forget_unwritten(0, 6)
    assert manager.match([keys], [3]).tolist() == [[0]]
    manager.check()
    assert manager.available_on(0) == 8


def test_without_caching_nothing_is_found() -> None:
    manager = KVManager([8], 4, caching=False)
    keys = chain(1, 3)
    cache(manager, 0, keys)
    assert manager.match([keys], [3]).tolist() == [[0]]
    assert manager.cached().tolist() == [0]


def test_blocks_of_an_earlier_controller_are_found_and_evicted_first() -> None:
    manager = KVManager([40, 40], 4)
    old = chain(1, 6)
    manager.adopt(1, np.array([3, 4, 5, 17, 18, 39]), as_keys(old))
    manager.check()
    assert manager.cached().tolist() == [0, 6] and manager.used().tolist() == [0, 0]
    assert manager.match([old], [6]).tolist() == [[0, 6]]
    assert manager.local(manager.prefix(1, old, 6)).tolist() == [3, 4, 5, 17, 18, 39]
    new = chain(2, 30)
    cache(manager, 1, new)
    pages = reserve(manager, 1, NONE, 10)
    assert pages is not None and len(np.unique(pages)) == 10
    assert manager.match([new], [30]).tolist() == [[0, 30]], "the old ones had to go"
    manager.check()


def test_of_two_pages_with_one_block_one_is_adopted() -> None:
    manager = KVManager([10], 4)
    block = chain(1, 1)
    manager.adopt(0, np.array([2, 7]), as_keys(block + block))
    manager.check()
    assert manager.cached().tolist() == [1] and manager.available_on(0) == 10


def test_all_blocks_of_a_data_index_are_forgotten_adopted_ones_too() -> None:
    manager = KVManager([10], 4)
    manager.adopt(0, np.array([2]), as_keys(chain(1, 1)))
    cache(manager, 0, chain(2, 3))
    manager.forget_unwritten(0, -1)
    assert manager.cached().tolist() == [1], "written by plan 0, of which no result is in"
    manager.forget_all(0)
    manager.check()
    assert manager.cached().tolist() == [0] and manager.available_on(0) == 10


PLACEMENTS = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 5), st.integers(1, 9)), max_size=4)
"""A round of requests: data index, prompt and its blocks."""


@settings(max_examples=60, deadline=None)
@given(st.lists(PLACEMENTS, max_size=12))
def test_reservations_of_a_round_get_the_pages_that_each_would_get_alone(
    rounds: list[list[tuple[int, int, int]]],
) -> None:
    together, alone = KVManager([24, 30], 4), KVManager([24, 30], 4)
    for placements in rounds:
        pages = [_serve(manager, placements, alone=manager is alone) for manager in (together, alone)]
        assert pages[0] == pages[1]


def _serve(manager: KVManager, placements: list[tuple[int, int, int]], *, alone: bool) -> list[list[int]]:
    """Computes and releases prompts. Returns the pages of those that had room."""
    placed: list[tuple[int, bytes, Int64]] = []
    counts, fresh = [], []
    for data, seed, length in placements:
        hashes = chain(seed, length)
        shared = manager.prefix(data, hashes, length)
        if manager.reserve(data, shared, length + 1 - len(shared)):
            placed.append((data, hashes, shared))
            counts.append(length + 1 - len(shared))
            if alone:
                fresh.append(manager.take_reserved())
    taken = np.concatenate([*fresh, manager.take_reserved()])
    rows = []
    for (data, hashes, shared), (start, end) in zip(placed, pairwise(accumulate([0, *counts])), strict=True):
        pages = np.concatenate([shared, taken[start:end]])
        manager.announce(np.full(len(pages) - 1, data), as_keys(hashes), pages[:-1])
        manager.mark_written(pages[:-1], 0)
        rows.append((data, pages))
    for row in rows:
        release(manager, row)
    manager.check()
    return [pages.tolist() for _, pages in rows]
