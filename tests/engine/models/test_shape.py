"""Costs of a model's layers, and the stages that follow from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import lockstep
from lockstep.engine.models.shape import Shape, read_shape
from support.engine.models.checkpoints import deepseek_v3_config, qwen3_moe_config

CONFIGS = Path(lockstep.__file__).parent / "recipes" / "configs"


def shape_of(folder: Path, config: dict[str, Any]) -> Shape:
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return read_shape(folder)


def test_a_layer_costs_the_parameters_that_a_token_meets(tmp_path: Path) -> None:
    """64 wide, 4 heads of 16 and 2 key heads, 2 of 8 experts of 32, one layer dense of 96."""
    attention = 64 * (64 + 32 + 32 + 64)
    experts, gate, dense, head = 2 * 3 * 64 * 32, 8 * 64, 3 * 64 * 96, 320 * 64
    for tied in (False, True):
        config = qwen3_moe_config(mlp_only_layers=[1], tie_word_embeddings=tied)
        assert shape_of(tmp_path, config).layer_costs == (
            attention + experts + gate,
            attention + dense,
            attention + experts + gate + head,
        )


def test_deepseek_heads_weigh_about_one_layer_and_a_half() -> None:
    *_, before, last = read_shape(CONFIGS / "deepseek-v3").layer_costs
    assert (last - before) / before == pytest.approx(1.6, abs=0.05)


@pytest.mark.parametrize(
    ("name", "num_stages", "expected"),
    [
        ("deepseek-v3", 2, [31, 30]),
        ("deepseek-v3", 4, [16, 16, 15, 14]),
        ("kimi-k2", 4, [16, 16, 16, 13]),
        ("qwen3-30b-a3b", 4, [14, 13, 13, 8]),
        ("mixtral-8x7b", 4, [8, 8, 8, 8]),
    ],
)
def test_the_stages_of_published_models(name: str, num_stages: int, expected: list[int]) -> None:
    stages = read_shape(CONFIGS / name).stages(num_stages)
    assert [stage.num_layers for stage in stages] == expected


def test_a_dense_layer_may_be_a_stage_of_its_own(tmp_path: Path) -> None:
    stages = shape_of(tmp_path, deepseek_v3_config(intermediate_size=512)).stages(2)
    assert [(stage.num_layers, stage.num_moe) for stage in stages] == [(1, 0), (2, 2)]
