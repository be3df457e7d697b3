"""The split of a model's layers over pipeline stages."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise


@dataclass(frozen=True)
class PipelineStage:
    """The layers of one stage, ``num_moe`` of them with experts. The first stage embeds, the last
    has the output head.
    """

    index: int
    layers: range
    num_moe: int
    first: bool
    last: bool

    @property
    def num_layers(self) -> int:
        return len(self.layers)


def whole_model(num_layers: int, moe_layers: Collection[int]) -> PipelineStage:
    """The stage that has all layers."""
    return PipelineStage(0, range(num_layers), len(moe_layers), first=True, last=True)


def split_layers(
    costs: Sequence[int], moe_layers: Collection[int], num_stages: int, followers: Collection[int] = ()
) -> list[PipelineStage]:
    """Stages of at least one layer each, of which the slowest takes as little as it can.

    ``costs``: of each layer; the head's is part of the last one's. ``followers`` stay with the
    layer before them. Splits that are equally good differ in their numbers of layers: the most even
    one is taken, with larger stages first.
    """
    starts = [layer for layer in range(len(costs)) if layer not in followers]
    assert 1 <= num_stages <= len(starts), f"{num_stages} stages of {len(starts)} layers"
    runs = [sum(costs[start:end]) for start, end in pairwise([*starts, len(costs)])]
    limit = _least_slowest(runs, num_stages)
    ends = [0, *accumulate(_most_even(costs, starts, num_stages, limit))]
    stages: list[PipelineStage] = []
    for index, (start, end) in enumerate(pairwise(ends)):
        num_moe = sum(start <= layer < end for layer in moe_layers)
        stages.append(PipelineStage(index, range(start, end), num_moe, index == 0, index == num_stages - 1))
    return stages


def _least_slowest(costs: Sequence[int], num_stages: int) -> int:
    """The least cost that no stage has to exceed."""
    low = max(costs)
    high = sum(costs)
    while low < high:
        middle = (low + high) // 2
        if _fewest_stages(costs, middle) <= num_stages:
            high = middle
        else:
            low = middle + 1
    return low


def _fewest_stages(costs: Sequence[int], limit: int) -> int:
    """Stages that the layers need if none may cost more than ``limit``."""
    stages, spent = 1, 0
    for cost in costs:
        if spent + cost > limit:
            stages, spent = stages + 1, 0
        spent += cost
    return stages


def _most_even(costs: Sequence[int], starts: Sequence[int], num_stages: int, limit: int) -> tuple[int, ...]:
    """Numbers of layers with the least sum of squares, if no stage may cost more than ``limit`` and
    each begins with one of ``starts``.
    """
    before = [0, *accumulate(costs)]
    borders = {*starts, len(costs)}

    @cache
    def best(start: int, left: int) -> tuple[int, tuple[int, ...]] | None:
        """The sum of squares and the negated numbers of ``left`` stages, from layer ``start`` on;
        None if there are none.
        """
        if not left:
            return (0, ()) if start == len(costs) else None
        found = []
        for end in range(start + 1, len(costs) - left + 2):
            if before[end] - before[start] > limit:
                break
            if end not in borders:
                continue
            if (rest := best(end, left - 1)) is not None:
                squares, numbers = rest
                found.append((squares + (end - start) ** 2, (start - end, *numbers)))
        return min(found, default=None)

    split = best(0, num_stages)
    assert split is not None, f"no split within {limit}"
    return tuple(-number for number in split[1])
