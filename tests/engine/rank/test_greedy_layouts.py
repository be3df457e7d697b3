"""Greedy tokens in float32 are those of transformers in every layout: EP 1, 2 and 4, both portable
dispatchers, chunked and unchunked, alone and batched, on prompts whose margins are stored with
them.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from lockstep.parallel.collectives import Collectives
from support.engine.rank.greedy_layouts import continue_prompts
from support.engine.rank.greedy_prompts import (
    ALL,
    FAMILIES,
    MIN_MARGIN,
    NUM_NEW,
    NUM_PROMPTS,
    Reference,
    load_prompts,
    write_family,
)
from support.engine.rank.hand_plans import Driver, Request, build_executor
from support.parallel.gloo_ranks import run_ranks

LAYOUTS = [(1, "local"), (2, "all_to_all"), (2, "all_gather"), (4, "all_to_all"), (4, "all_gather")]
GROUPS = (tuple(FAMILIES)[:4], tuple(FAMILIES)[4:])
# Every family in every layout of one and two ranks, and by one dispatcher on four.
CASES = [
    case
    for case in itertools.product(LAYOUTS, GROUPS)
    if case not in (((4, "all_to_all"), GROUPS[1]), ((4, "all_gather"), GROUPS[0]))
]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("greedy")
    return {family: write_family(folder / family, family) for family in FAMILIES}


@pytest.fixture(
    scope="module",
    params=CASES,
    ids=lambda param: f"{param[0][0]}-{param[0][1]}-{param[1][0]}...",
)
def tokens_by_rank(
    request: pytest.FixtureRequest, paths: dict[str, Path]
) -> list[dict[str, list[list[int]]]]:
    """Tokens of each prompt by family, for every rank of a layout. One start of processes serves a
    group of families.
    """
    (size, dispatch), group = request.param
    chosen = {family: paths[family] for family in group}
    if size == 1:
        return [
            continue_prompts(Collectives("alone", 0, 1, None, 1.0, torch.device("cpu")), chosen, dispatch)
        ]
    return run_ranks(continue_prompts, size, chosen, dispatch)


@pytest.mark.parametrize("family", ALL)
def test_the_stored_prompts_are_what_transformers_says(family: str, tmp_path: Path) -> None:
    prompts = load_prompts(family)
    assert len(prompts) == NUM_PROMPTS and all(len(entry.tokens) == NUM_NEW for entry in prompts)
    assert len({token for entry in prompts for token in entry.tokens}) > 100
    reference = Reference(write_family(tmp_path / family, family), ALL[family])
    for entry in prompts:
        best, top2, router = reference.judge(entry.prompt, entry.tokens)
        assert best == entry.tokens and min(top2, router) > MIN_MARGIN
        assert top2 == pytest.approx(entry.top2_margin, abs=1e-5) and router == pytest.approx(
            entry.router_margin, abs=1e-5
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_alone(family: str, paths: dict[str, Path]) -> None:
    for number, entry in enumerate(load_prompts(family)):
        assert (
            Driver(build_executor(paths[family]), [Request(entry.prompt, NUM_NEW)]).run()[0] == entry.tokens
        ), f"prompt {number}"


def test_layout(tokens_by_rank: list[dict[str, list[list[int]]]]) -> None:
    size = len(tokens_by_rank)
    holders = max(size - 1, 1)
    for family in tokens_by_rank[0]:
        assert not size > 1 or tokens_by_rank[-1][family] == []
        for rank in range(holders):
            assert tokens_by_rank[rank][family] == [
                entry.tokens for entry in load_prompts(family)[rank::holders]
            ], f"{family}, rank {rank}"
