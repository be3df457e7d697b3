"""The split of a model's layers over pipeline stages."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


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
    return split_layers(num_layers, moe_layers, 1)[0]


def split_layers(num_layers: int, moe_layers: Collection[int], num_stages: int) -> list[PipelineStage]:
    """Stages whose numbers of layers differ by at most one, the larger ones first."""
    stages: list[PipelineStage] = []
    for index in range(num_stages):
        start = stages[-1].layers.stop if stages else 0
        end = start + num_layers // num_stages + (index < num_layers % num_stages)
        num_moe = sum(start <= layer < end for layer in moe_layers)
        stages.append(PipelineStage(index, range(start, end), num_moe, index == 0, index == num_stages - 1))
    return stages
