"""The split of layers over pipeline stages."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given, strategies as st

from lockstep.parallel.stages import split_layers, whole_model


def numbers_of(costs: list[int], num_stages: int) -> list[int]:
    return [stage.num_layers for stage in split_layers(costs, (), num_stages)]


@pytest.mark.parametrize(("num_layers", "num_stages"), [(1, 1), (7, 3), (61, 4), (8, 8)])
def test_every_layer_has_one_stage_and_equal_layers_are_spread_evenly(
    num_layers: int, num_stages: int
) -> None:
    stages = split_layers([5] * num_layers, range(3, num_layers), num_stages)
    assert [layer for stage in stages for layer in stage.layers] == list(range(num_layers))
    counts = [stage.num_layers for stage in stages]
    assert counts == sorted(counts, reverse=True) and counts[0] - counts[-1] <= 1
    assert [stage.num_moe for stage in stages] == [
        sum(layer >= 3 for layer in stage.layers) for stage in stages
    ]
    assert [stage.index for stage in stages if stage.first] == [0]
    assert [stage.index for stage in stages if stage.last] == [num_stages - 1]


@pytest.mark.parametrize(("num_stages", "expected"), [(1, [7]), (2, [3, 4]), (3, [1, 2, 4])])
def test_followers_stay_with_the_layer_before_them(num_stages: int, expected: list[int]) -> None:
    stages = split_layers([5] * 7, (), num_stages, followers=(2, 4, 5, 6))
    assert [stage.num_layers for stage in stages] == expected


def test_one_stage_is_the_whole_model() -> None:
    assert split_layers([3, 1, 4], (1, 2), 1) == [whole_model(3, (1, 2))]


@pytest.mark.parametrize(
    ("costs", "num_stages", "expected"),
    [
        ([10, 10, 10, 10, 10, 26], 2, [4, 2]),  # a head of 1.6 layers
        ([10, 10, 10, 10, 10, 60], 2, [5, 1]),  # one that outweighs all layers
        ([40, 10, 10, 10, 10], 2, [1, 4]),  # a first layer that does
        ([10, 10, 10, 10, 10, 11], 2, [3, 3]),
        ([10, 10, 10, 10, 30], 3, [2, 2, 1]),  # not [3, 1, 1], which is as fast
        ([10, 10, 10, 10, 10], 4, [2, 1, 1, 1]),
        ([7, 100, 7, 7], 3, [1, 1, 2]),
    ],
)
def test_the_slowest_stage_decides_then_evenness_then_larger_stages_first(
    costs: list[int], num_stages: int, expected: list[int]
) -> None:
    assert numbers_of(costs, num_stages) == expected


@given(st.data())
def test_no_other_split_is_better(data: st.DataObject) -> None:
    """Beside all splits: the slowest stage, then the sum of squares, then larger stages first."""
    costs = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=9))
    num_stages = data.draw(st.integers(1, len(costs)))
    splits = [
        list(pairwise((0, *cuts, len(costs)))) for cuts in combinations(range(1, len(costs)), num_stages - 1)
    ]

    def rank(split: list[tuple[int, int]]) -> tuple[int, int, list[int]]:
        counts = [end - start for start, end in split]
        slowest = max(sum(costs[start:end]) for start, end in split)
        return slowest, sum(count**2 for count in counts), [-count for count in counts]

    best = min(splits, key=rank)
    assert numbers_of(costs, num_stages) == [end - start for start, end in best]
