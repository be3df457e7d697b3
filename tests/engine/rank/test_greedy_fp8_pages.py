"""Greedy tokens over FP8 pages do not depend on the layout: EP 1, 2 and 4, both portable
dispatchers, whole and in chunks, alone and batched, at once and as two
microbatches. Alone and whole is the reference here; what FP8
costs is measured elsewhere.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lockstep.parallel.collectives import Collectives
from support.engine.rank.fp8_layouts import NUM_NEW, certain, continue_over_fp8
from support.engine.rank.greedy_prompts import NUM_PROMPTS, load_prompts, write_family
from support.parallel.gloo_ranks import run_ranks

FAMILIES = ("qwen3_moe", "deepseek_v3", "gpt_oss")


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("greedy")
    return {family: write_family(folder / family, family) for family in FAMILIES}


@pytest.fixture(scope="module")
def expected(paths: dict[str, Path]) -> dict[str, list[list[int]]]:
    found = {family: certain(path, family) for family, path in paths.items()}
    for family, tokens in found.items():
        assert sum(map(len, tokens)) > NUM_PROMPTS * NUM_NEW / 2, f"{family}: too little is certain"
        plain = [entry.tokens for entry in load_prompts(family)]
        assert any(mine != theirs[: len(mine)] for mine, theirs in zip(tokens, plain, strict=True)), (
            "FP8 changes nothing?"
        )
    return found


@pytest.mark.parametrize(
    ("size", "dispatch", "microbatches"),
    [(1, "local", 1), (2, "all_to_all", 1), (2, "all_to_all", 2), (2, "all_gather", 1), (4, "all_to_all", 1)],
)
def test_layout(
    paths: dict[str, Path], expected: dict[str, list[list[int]]], size: int, dispatch: str, microbatches: int
) -> None:
    if size == 1:
        by_rank = [
            continue_over_fp8(Collectives("alone", 0, 1, None, 1.0, torch.device("cpu")), paths, dispatch)
        ]
    else:
        by_rank = run_ranks(continue_over_fp8, size, paths, dispatch, microbatches)
    for family in FAMILIES:
        for rank, found in enumerate(by_rank):
            for number, (tokens, sure) in enumerate(
                zip(found[family], expected[family][rank::size], strict=True)
            ):
                assert tokens[: len(sure)] == sure, f"{family}, rank {rank}, prompt {number}"
