"""The executor of a device on several ranks: greedy tokens are those of transformers, drawn ones
those of the other executor on one rank.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from support.engine.rank.greedy_layouts import continue_mixed, continue_prompts, continue_split
from support.engine.rank.greedy_prompts import load_prompts, write_family
from support.parallel.gloo_ranks import run_ranks

FAMILIES = ("qwen3_moe", "deepseek_v3")


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("device-layouts")
    return {family: write_family(folder / family, family) for family in FAMILIES}


@pytest.mark.parametrize(("dispatch", "microbatches"), [("all_gather", 2), ("all_to_all", 1)])
def test_data_parallel(dispatch: str, microbatches: int, paths: dict[str, Path]) -> None:
    by_rank = run_ranks(continue_prompts, 2, paths, dispatch, microbatches, True)
    for family in FAMILIES:
        assert by_rank[1][family] == [], "it takes part without a token of its own"
        assert by_rank[0][family] == [entry.tokens for entry in load_prompts(family)]


def test_tensor_parallel(paths: dict[str, Path]) -> None:
    by_rank = run_ranks(continue_split, 2, paths, 2, 1, True)
    for family in FAMILIES:
        stored = [entry.tokens for entry in load_prompts(family)]
        assert by_rank[0][family] == stored
        assert by_rank[1][family] == [[-1] * len(tokens) for tokens in stored]


def test_rows_of_all_kinds_under_tensor_parallelism(paths: dict[str, Path]) -> None:
    for rank, (split, alone, columns) in enumerate(run_ranks(continue_mixed, 2, paths["qwen3_moe"], True)):
        assert split == (alone if rank == 0 else [[-1] * len(tokens) for tokens in alone])
        assert columns == {2}, "plain rows: value and token of its part of the vocabulary"
