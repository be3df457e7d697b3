"""The vectorised block index against a dict."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings, strategies as st

from lockstep.engine.kv.block_index import BlockIndex
from lockstep.engine.protocol.arrays import as_keys


def keys_of(numbers: list[int]) -> np.ndarray:
    """Keys that collide in their low bits, so that probing is exercised."""
    return np.array([[number << 40, number] for number in numbers], np.uint64).reshape(-1, 2)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.booleans(), st.lists(st.tuples(st.integers(0, 1), st.integers(0, 30)), max_size=12)),
        max_size=40,
    )
)
def test_agrees_with_a_dict(script: list[tuple[bool, list[tuple[int, int]]]]) -> None:
    index = BlockIndex(200, 2)
    model: dict[tuple[int, int], int] = {}
    free = list(range(200))
    for insert, names in script:
        data = np.array([d for d, _ in names], np.int64)
        keys = keys_of([n for _, n in names])
        if insert:
            pages = np.array([free.pop() for _ in names], np.int64)
            taken = index.insert(data, keys, pages)
            for name, page, took in zip(names, pages.tolist(), taken.tolist(), strict=True):
                # Exactly one of equal names in one call wins.
                if took:
                    assert name not in model
                    model[name] = page
                else:
                    free.append(page)
            assert all(name in model for name in names)
        else:
            gone = list({model.pop(name) for name in names if name in model})
            index.remove(np.array(gone, np.int64))
            free += gone
        index.check()
        everything = [(d, n) for d in range(2) for n in range(31)]
        found = index.find(np.array([d for d, _ in everything]), keys_of([n for _, n in everything]))
        assert found.tolist() == [model.get(name, -1) for name in everything]
        assert index.find_everywhere(keys_of(list(range(31)))).T.ravel().tolist() == found.tolist()


def test_long_use_keeps_the_table_clean() -> None:
    index = BlockIndex(1000, 1)
    random = np.random.default_rng(0)
    pages = np.arange(500)
    for _ in range(300):
        index.insert(np.zeros(500, np.int64), as_keys(random.bytes(16 * 500)), pages)
        index.remove(pages)
    assert index.size == 0
    assert not (index._table == -2).any(), "tombstones are left behind"


def test_the_table_does_not_fill_up_beside_entries_that_stay() -> None:
    """Entries that come and go before one that stays leave no tombstones that a search would have
    to step over.
    """
    index = BlockIndex(64, 1)
    random = np.random.default_rng(0)
    zero = np.zeros(1, np.int64)
    index.insert(np.zeros(32, np.int64), as_keys(random.bytes(16 * 32)), np.arange(32))
    for turn in range(5000):
        index.insert(zero, as_keys(random.bytes(16)), zero + 32 + turn % 2)
        index.remove(zero + 32 + (turn + 1) % 2)
        assert np.count_nonzero(index._table == -2) <= 34, "searches step over removed entries"
    index.check()


def test_a_full_index_in_which_some_entries_stay_keeps_its_searches_short() -> None:
    index = BlockIndex(1024, 1)
    random, pages = np.random.default_rng(0), np.arange(1000)
    index.insert(np.zeros(1000, np.int64), as_keys(random.bytes(16 * 1000)), pages)
    for _ in range(2000):
        gone = random.choice(pages[100:], 32, replace=False)
        index.remove(gone)
        index.insert(np.zeros(32, np.int64), as_keys(random.bytes(16 * 32)), gone)
    index.check()
    assert np.count_nonzero(index._table == -2) < 250
    assert index._passed.sum() < 600, "entries are far from the start of their search"


def test_equal_hashes_on_two_data_indices_are_two_blocks() -> None:
    index = BlockIndex(8, 2)
    key = as_keys(b"0123456789abcdef" * 2)
    assert index.insert(np.array([0, 1]), key, np.array([3, 5])).all()
    assert index.find(np.array([0, 1]), key).tolist() == [3, 5]
