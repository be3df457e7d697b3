"""The split of layers over pipeline stages."""

from __future__ import annotations

import pytest

from lockstep.parallel.stages import split_layers


@pytest.mark.parametrize(("num_layers", "num_stages"), [(1, 1), (7, 3), (61, 4), (8, 8)])
def test_every_layer_has_one_stage_and_stages_are_even(num_layers: int, num_stages: int) -> None:
    stages = split_layers(num_layers, range(3, num_layers), num_stages)
    assert [layer for stage in stages for layer in stage.layers] == list(range(num_layers))
    assert max(stage.num_layers for stage in stages) - min(stage.num_layers for stage in stages) <= 1
    assert [stage.num_moe for stage in stages] == [
        sum(layer >= 3 for layer in stage.layers) for stage in stages
    ]
    assert [stage.index for stage in stages if stage.first] == [0]
    assert [stage.index for stage in stages if stage.last] == [num_stages - 1]
