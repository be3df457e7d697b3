"""Parts of a tensor group: their rows and columns, and that together they are the whole."""

from __future__ import annotations

import pytest
import torch

from lockstep.parallel.tensor import UNSPLIT, Shard, shard_of
from support.parallel.gloo_ranks import run_ranks
from support.parallel.split_layers import SIZE, halves, most, relay


@pytest.mark.parametrize(
    ("full", "parts", "bounds"),
    [
        (8, 2, [(0, 4), (4, 8)]),
        (9, 2, [(0, 5), (5, 9)]),
        (5, 4, [(0, 2), (2, 4), (4, 5), (5, 5)]),
        (3, 4, [(0, 1), (1, 2), (2, 3), (3, 3)]),
    ],
)
def test_the_parts_of_a_vocabulary_are_the_whole(
    full: int, parts: int, bounds: list[tuple[int, int]]
) -> None:
    rows = -(-full // parts)
    shards = [Shard(0, index, parts, full) for index in range(parts)]
    assert [shard.bounds(rows) for shard in shards] == bounds
    assert {shard.whole((rows, 7)) for shard in shards} == {(full, 7)}


def test_neighbours_share_a_part() -> None:
    class FourWays:
        size = 4

        def __init__(self, index: int) -> None:
            self.index = index

    shards = [shard_of(FourWays(index), 0, copies=2) for index in range(4)]  # type: ignore[arg-type]
    assert [shard.bounds(3) for shard in shards] == [(0, 3), (0, 3), (3, 6), (3, 6)]
    assert shard_of(UNSPLIT, 1).is_whole


def test_one_bias_of_a_sum_counts() -> None:
    assert Shard(index=1, added_once=True).whole((5,)) == (5,)


def test_two_ranks_compute_what_one_does() -> None:
    for found in run_ranks(halves, SIZE):
        for name, (here, whole) in found.items():
            assert torch.allclose(torch.tensor(here), torch.tensor(whole), atol=1e-5), name


def test_the_first_rank_with_the_largest_value_decides() -> None:
    expected = [100_000, 1, 2, 100_003, 4, 5, 6, 7]
    assert run_ranks(most, SIZE) == [(expected, [])] * SIZE


def test_stages_relay_and_the_last_hands_back() -> None:
    first, last = run_ranks(relay, SIZE)
    assert first == [[10, 11], [20]], "tokens of two steps, the later one waited for first"
    assert last == [[[0.0, 1.0, 2.0]] * 2, [[5.0, 6.0, 7.0]]]
