"""Dispatchers: EP=N equals EP=1, bit for bit, whatever the exchange and wherever the tokens are."""

from __future__ import annotations

import pytest
import torch

from lockstep.kernels.reference.experts import experts_reference
from lockstep.moe.balance.placement import EMPTY, contiguous
from lockstep.parallel.collectives import Collectives
from support.moe.exchange import LAYERS, Case, run_case, run_cases
from support.parallel.gloo_ranks import run_ranks

KINDS = ("all_gather", "all_to_all")
ALONE = Collectives("alone", 0, 1, None, 1.0, torch.device("cpu"))


def _cases(world: int) -> list[Case]:
    spread = (3, 0, 5, 1)[:world]
    return [
        Case("spread, one rank without tokens", 8, 2, spread, 5),
        Case("uneven experts", 7, 3, spread, 6),
        Case("fewer experts than ranks", 3, 2, spread, 5),
        Case("one expert takes all", 8, 1, spread, 5, only=6),
        Case("one expert is everybody's first choice", 8, 2, spread, 5, only=0),
        Case("no tokens anywhere", 8, 2, (0,) * world, 4),
        Case("a capacity of zero", 8, 2, (0,) * world, 0),
        Case("large, counted beforehand", 8, 2, (70, 1, 33, 0)[:world], 1024),
        Case("bf16", 8, 4, spread, 5, dtype=torch.bfloat16),
    ]


@pytest.mark.parametrize("world", [2, 4])
def test_expert_parallel_equals_one_rank(world: int) -> None:
    cases = _cases(world)
    by_rank = run_ranks(run_cases, world, cases, KINDS)
    for number, case in enumerate(cases):
        expected, expected_counts = run_case(case, "local", ALONE)
        placement = contiguous(LAYERS, case.num_experts, world)
        for which, kind in enumerate(KINDS):
            results = [by_rank[rank][number][which] for rank in range(world)]
            for layer in range(LAYERS):
                joined = torch.cat([outputs[layer] for outputs, _ in results])
                assert torch.equal(joined, expected[layer]), (
                    f"{case.name}, {kind}, layer {layer}: outputs differ"
                )
                counts = torch.zeros(case.num_experts, dtype=torch.int64)
                for rank, (_, counts_LS) in enumerate(results):
                    for slot, expert in enumerate(placement.experts_of(rank, layer)):
                        if expert == EMPTY:
                            assert counts_LS[layer, slot] == 0, (
                                f"{case.name}, {kind}: an empty slot met tokens"
                            )
                        else:
                            counts[expert] += counts_LS[layer, slot]
                assert torch.equal(counts, expected_counts[layer]), (
                    f"{case.name}, {kind}, layer {layer}: counts differ"
                )


@pytest.mark.parametrize("kind", KINDS)
def test_one_rank_through_any_dispatcher(kind: str) -> None:
    for case in _cases(1):
        expected, counts = run_case(case, "local", ALONE)
        outputs, other_counts = run_case(case, kind, ALONE)
        assert torch.equal(torch.stack(outputs), torch.stack(expected)) and torch.equal(counts, other_counts)


def test_local_is_the_definition() -> None:
    case = Case("definition", 8, 3, (9,), 9, dtype=torch.float64)
    x, ids, weights = case.inputs()
    w13, w2 = case.weights(list(range(8)))
    pairs = experts_reference(
        x, torch.arange(9).repeat_interleave(3), ids.flatten(), w13, w2, torch.zeros(8, dtype=torch.int64)
    )
    expected = (pairs.view(9, 3, -1) * weights[..., None]).sum(1)
    outputs, counts = run_case(case, "local", ALONE)
    torch.testing.assert_close(outputs[0], expected)
    assert counts[0].tolist() == torch.bincount(ids.flatten(), minlength=8).tolist()


def test_more_tokens_than_capacity_is_our_bug() -> None:
    with pytest.raises(AssertionError, match="5 tokens, capacity 4"):
        run_case(
            Case("too many", 8, 2, (5,), 4),
            "all_to_all",
            Collectives("two", 0, 2, torch.distributed.HashStore(), 1.0, torch.device("cpu")),
        )
