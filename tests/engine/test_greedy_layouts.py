"""Greedy tokens in float32 are those of transformers in every layout: EP 1, 2 and 4, both portable dispatchers, chunked and
unchunked, alone and batched, on prompts whose margins are stored with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lockstep.parallel.collectives import Collectives
from support.gloo_ranks import run_ranks
from support.greedy_layouts import continue_prompts
from support.greedy_prompts import FAMILIES, MIN_MARGIN, NUM_NEW, NUM_PROMPTS, Reference, load_prompts, write_family
from support.hand_plans import Driver, Request, build_executor


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def path(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(tmp_path_factory.mktemp("greedy") / family, family)


def test_the_stored_prompts_are_what_transformers_says(family: str, path: Path) -> None:
    prompts = load_prompts(family)
    assert len(prompts) == NUM_PROMPTS and all(len(entry.tokens) == NUM_NEW for entry in prompts)
    assert len({token for entry in prompts for token in entry.tokens}) > 100
    reference = Reference(path, FAMILIES[family])
    for entry in prompts:
        best, top2, router = reference.judge(entry.prompt, entry.tokens)
        assert best == entry.tokens and min(top2, router) > MIN_MARGIN
        assert top2 == pytest.approx(entry.top2_margin, abs=1e-5) and router == pytest.approx(entry.router_margin, abs=1e-5)


def test_alone(family: str, path: Path) -> None:
    for number, entry in enumerate(load_prompts(family)):
        assert Driver(build_executor(path), [Request(entry.prompt, NUM_NEW)]).run()[0] == entry.tokens, f"prompt {number}"


@pytest.mark.parametrize(("size", "dispatch"), [(1, "local"), (2, "all_to_all"), (2, "all_gather"), (4, "all_to_all"), (4, "all_gather")])
def test_layout(family: str, path: Path, size: int, dispatch: str) -> None:
    if size == 1:
        by_rank = [continue_prompts(Collectives("alone", 0, 1, None, 1.0, torch.device("cpu")), path, family, dispatch)]
    else:
        by_rank = run_ranks(continue_prompts, size, path, family, dispatch)
    holders = max(size - 1, 1)
    for way in ("batched", "chunked"):
        assert not size > 1 or by_rank[-1][way] == []
        for rank in range(holders):
            expected = [entry.tokens for entry in load_prompts(family)[rank::holders]]
            assert by_rank[rank][way] == expected, f"{way}, rank {rank}"
