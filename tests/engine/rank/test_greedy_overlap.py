"""Greedy tokens in float32 are those of transformers where every step is computed as two
microbatches: prompts whole and cut, beside rows that decode, on ranks with many rows, few and none.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from support.engine.rank.greedy_layouts import continue_prompts, continue_split
from support.engine.rank.greedy_prompts import FAMILIES, load_prompts, write_family
from support.parallel.gloo_ranks import run_ranks


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("overlap")
    some = *FAMILIES, "glm_moe_dsa"  # which keeps an indexer's choice for the layers after it
    return {family: write_family(folder / family, family) for family in some}


@pytest.mark.parametrize(("size", "dispatch"), [(2, "all_to_all"), (2, "all_gather"), (4, "all_to_all")])
def test_data_parallel(size: int, dispatch: str, paths: dict[str, Path]) -> None:
    paths = dict(list(paths.items())[:: size // 2])  # on four ranks every second family
    by_rank = run_ranks(continue_prompts, size, paths, dispatch, 2)
    holders = size - 1
    for family in paths:
        assert by_rank[-1][family] == []
        for rank in range(holders):
            expected = [entry.tokens for entry in load_prompts(family)[rank::holders]]
            assert by_rank[rank][family] == expected, f"{family}, rank {rank}"


def test_tensor_beside_data_parallel(paths: dict[str, Path]) -> None:
    paths = dict(list(paths.items())[1::2])
    assert "minimax_m2" not in paths, "its norms go over all heads, which cannot be split"
    by_rank = run_ranks(continue_split, 4, paths, 2, 2)
    for family in paths:
        for rank, found in enumerate(by_rank):
            data, index = divmod(rank, 2)
            stored = [entry.tokens for entry in load_prompts(family)[data::2]]
            expected = stored if index == 0 else [[-1] * len(tokens) for tokens in stored]
            assert found[family] == expected, f"{family}, rank {rank}"
