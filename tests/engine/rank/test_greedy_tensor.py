"""Greedy tokens in float32 are those of transformers where a tensor group splits attention, dense
layers and the vocabulary, alone and beside data parallelism.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from support.engine.rank.greedy_layouts import continue_split
from support.engine.rank.greedy_prompts import FAMILIES, load_prompts, write_family
from support.parallel.gloo_ranks import run_ranks

SPLIT = [family for family in FAMILIES if family != "minimax_m2"]  # its norms go over all heads


@pytest.mark.parametrize(("world", "tensor"), [(2, 2), (4, 2), (4, 4)])
def test_layout(world: int, tensor: int, tmp_path: Path) -> None:
    paths = {family: write_family(tmp_path / family, family) for family in SPLIT}
    by_rank = run_ranks(continue_split, world, paths, tensor)
    holders = world // tensor
    for family in SPLIT:
        for rank, found in enumerate(by_rank):
            data, index = divmod(rank, tensor)
            stored = [entry.tokens for entry in load_prompts(family)[data::holders]]
            expected = stored if index == 0 else [[-1] * len(tokens) for tokens in stored]
            assert found[family] == expected, f"{family}, rank {rank}"
