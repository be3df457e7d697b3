"""Greedy and seeded tokens in float32 are those of one rank where dense layers and shared experts
are split over ranks with different tokens, or none, in one microbatch and in two.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from support.engine.models.checkpoints import deepseek_v3_config, qwen3_moe_config, write_checkpoint
from support.engine.models.family_configs import qwen2_moe_config
from support.engine.rank.dense_layouts import continue_dense, requests
from support.engine.rank.hand_plans import Driver, build_executor
from support.parallel.gloo_ranks import run_ranks

CONFIGS = {
    "deepseek_v3": deepseek_v3_config(),
    "qwen3_moe": qwen3_moe_config(mlp_only_layers=[1]),
    "qwen2_moe": qwen2_moe_config(mlp_only_layers=[1]),  # a gate on the sum of shared experts
}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("dense")
    return {family: write_checkpoint(folder / family, config, seed=11) for family, config in CONFIGS.items()}


@pytest.fixture(scope="module")
def alone(paths: dict[str, Path]) -> dict[str, list[list[int]]]:
    """The tokens of one rank."""
    return {family: Driver(build_executor(path), requests(family)).run() for family, path in paths.items()}


@pytest.mark.parametrize(
    ("world", "tensor", "dense", "dispatch", "as_device"),
    [
        (2, 1, 2, "all_to_all", False),
        (2, 1, 2, "all_gather", True),
        (2, 2, 2, "all_gather", False),
        (4, 1, 2, "all_to_all", False),
        (4, 2, 4, "all_gather", False),
    ],
)
def test_tokens_are_those_of_one_rank(
    world: int,
    tensor: int,
    dense: int,
    dispatch: str,
    as_device: bool,
    paths: dict[str, Path],
    alone: dict[str, list[list[int]]],
) -> None:
    by_rank = run_ranks(continue_dense, world, paths, tensor, dense, dispatch, as_device)
    holders = max(world // tensor - 1, 1)
    for rank, found in enumerate(by_rank):
        data, index = divmod(rank, tensor)
        for (family, microbatches), tokens in found.items():
            expected = alone[family][data::holders] if data < holders else []
            if index:  # it takes over what another rank samples
                expected = [[-1] * len(each) for each in expected]
            assert tokens == expected, f"{family}, rank {rank}, {microbatches} microbatches"
