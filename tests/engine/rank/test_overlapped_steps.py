"""Steps as two microbatches on ranks that meet: all start their collectives in one order, whatever
rows they have, and a death in the middle of a step abandons it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.engine.rank.greedy_prompts import load_prompts, write_family
from support.engine.rank.overlapped_steps import (
    FAMILY,
    continue_in_stages,
    continue_on_devices,
    one_fails,
    order_beside_tensor_groups,
    order_of_collectives,
)
from support.parallel.gloo_ranks import run_ranks


def test_collectives_are_started_in_the_same_order_by_all_ranks(tmp_path: Path) -> None:
    by_rank = run_ranks(order_of_collectives, 3, write_family(tmp_path / "model", FAMILY))
    first = by_rank[0]
    assert by_rank[1] == first and by_rank[2] == first
    assert len(first) > 6 * 2 * 2 * 2
    # Each of a layer's collectives is started by both microbatches, one after the other.
    assert first[0::2] == first[1::2]
    assert "the number of" in first[0], "counted beforehand"
    assert any("the number of" not in each and "tokens of" in each for each in first)


def test_tensor_groups_give_turns_and_order_does_not_depend_on_their_tokens(tmp_path: Path) -> None:
    """Both microbatches of a step get to each sum of a group before either waits for the next."""
    by_rank = run_ranks(order_beside_tensor_groups, 4, write_family(tmp_path / "model", FAMILY))
    experts, sums = by_rank[0]
    assert [found for found, _ in by_rank] == [experts] * 4
    assert experts[0::2] == experts[1::2] and len(experts) > 6 * 2 * 2 * 2
    assert by_rank[1][1] == sums and by_rank[2][1] == by_rank[3][1] == []
    names = {"the sum of a split layer", "this rank's run of the tokens", "the runs of all tokens"}
    assert set(sums) == names
    prompt = sums[:12]  # of a step in which both microbatches have tokens
    assert prompt[0::2] == prompt[1::2]


@pytest.mark.parametrize("continue_there", [continue_in_stages, continue_on_devices])
def test_each_microbatch_is_handed_to_the_next_stage_when_it_is_done(
    continue_there: Callable[..., Any], tmp_path: Path
) -> None:
    """Tokens are those of transformers, in one microbatch and in two."""
    (first, sent), (last, sent_back) = run_ranks(continue_there, 2, write_family(tmp_path / "model", FAMILY))
    stored = [entry.tokens for entry in load_prompts(FAMILY)[:4]]
    assert last == {1: stored, 2: stored}
    assert first == {number: [[-1] * len(tokens) for tokens in stored] for number in (1, 2)}
    assert sent_back == {1: [], 2: []}
    at_once, halves = dict(sent[1]), dict(sent[2])
    assert all(tag % 2 == 0 for tag in at_once) and {tag % 2 for tag in halves} == {0, 1}
    for tag, num_tokens in at_once.items():
        assert halves[tag] + halves.get(tag + 1, 0) == num_tokens


@pytest.mark.parametrize("last", [9, 10, 31])
def test_a_failure_ends_both_microbatches_and_abandons_the_step_of_the_others(
    last: int, tmp_path: Path
) -> None:
    """In the first or the second microbatch of a prompt's step, or in one that decodes."""
    by_rank = run_ranks(one_fails, 2, write_family(tmp_path / "model", FAMILY), last)
    (abandoned, steps, after), (bug, steps_there, after_there) = by_rank
    assert abandoned.startswith("StepAbandoned: watched: rank 0 waited for "), abandoned
    assert bug == "ArithmeticError: a bug"
    assert steps == steps_there and after == after_there == (1, 2)
