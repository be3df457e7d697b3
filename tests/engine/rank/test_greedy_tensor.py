"""Greedy tokens in float32 are those of transformers where a tensor group splits attention, dense
layers and the vocabulary, alone and beside data parallelism.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from support.engine.rank.greedy_layouts import continue_mixed, continue_split
from support.engine.rank.greedy_prompts import ALL, load_prompts, write_family
from support.parallel.gloo_ranks import run_ranks

SPLIT = [family for family in ALL if family != "minimax_m2"]  # its norms go over all heads


@pytest.mark.parametrize(("world", "tensor"), [(2, 2), (4, 2), (4, 4)])
def test_layout(world: int, tensor: int, tmp_path: Path) -> None:
    """Every family on two ranks, and on one layout of four."""
    families = {(2, 2): SPLIT, (4, 2): SPLIT[::2], (4, 4): SPLIT[1::2]}[world, tensor]
    paths = {family: write_family(tmp_path / family, family) for family in families}
    by_rank = run_ranks(continue_split, world, paths, tensor)
    holders = world // tensor
    for family in families:
        for rank, found in enumerate(by_rank):
            data, index = divmod(rank, tensor)
            stored = [entry.tokens for entry in load_prompts(family)[data::holders]]
            expected = stored if index == 0 else [[-1] * len(tokens) for tokens in stored]
            assert found[family] == expected, f"{family}, rank {rank}"


@pytest.mark.parametrize("size", [2, 4])
def test_plain_greedy_rows_gather_two_numbers_whatever_their_company(size: int, tmp_path: Path) -> None:
    """Beside rows that are drawn, penalised, biased, limited, or want log-probabilities."""
    by_rank = run_ranks(continue_mixed, size, write_family(tmp_path / "model", "qwen3_moe"))
    for rank, (split, alone, columns) in enumerate(by_rank):
        assert split == (alone if rank == 0 else [[-1] * len(tokens) for tokens in alone]), f"rank {rank}"
        assert columns == {2}, f"rank {rank}: value and token of its part of the vocabulary"
