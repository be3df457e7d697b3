"""Dispatchers: EP=N equals EP=1, bit for bit, whatever the exchange and wherever the tokens are."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from lockstep.kernels.reference.experts import experts_reference
from lockstep.moe.balance.placement import EMPTY, Placement
from lockstep.moe.dispatch.replicas import ReplicaChoice
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


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As in the ranks: the bits of a product depend on its number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("world", [2, 4])
def test_expert_parallel_equals_one_rank(world: int) -> None:
    cases = _cases(world)
    by_rank = run_ranks(run_cases, world, cases, KINDS)
    for number, case in enumerate(cases):
        expected, expected_counts = run_case(case, "local", ALONE)
        placement = case.placement(world)
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


@pytest.mark.parametrize(("world", "vacant"), [(4, (1,)), (3, (0, 2))])
def test_the_others_equal_one_rank_where_positions_are_vacant(world: int, vacant: tuple[int, ...]) -> None:
    """As with replicas, outputs are close, counts equal."""
    tokens = [(3, 4, 5, 1)[rank] * (rank not in vacant) for rank in range(world)]
    large = [count * 14 for count in tokens]
    cases = [
        Case("small, padded", 8, 2, tuple(tokens), 5, redundant=16, vacant=vacant),
        Case("large, counted beforehand", 8, 2, tuple(large), 1024, redundant=16, vacant=vacant),
        Case("bf16", 8, 4, tuple(tokens), 5, dtype=torch.bfloat16, redundant=16, vacant=vacant),
    ]
    by_rank = run_ranks(run_cases, world, cases, KINDS)
    present = [rank for rank in range(world) if rank not in vacant]
    for number, case in enumerate(cases):
        expected, expected_counts = run_case(case, "local", ALONE)
        for which, kind in enumerate(KINDS):
            results = [by_rank[rank][number][which] for rank in present]
            for layer in range(LAYERS):
                joined = torch.cat([outputs[layer] for outputs, _ in results])
                bf16 = case.dtype == torch.bfloat16
                torch.testing.assert_close(
                    joined, expected[layer], rtol=2e-2 if bf16 else 1e-5, atol=1e-2 if bf16 else 1e-6
                )
                met = sum(int(counts_LS[layer].sum()) for _, counts_LS in results)
                assert met == int(expected_counts[layer].sum()), f"{case.name}, {kind}, layer {layer}"


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


@pytest.mark.parametrize("world", [2, 4])
def test_replicas_compute_what_one_rank_does(world: int) -> None:
    """Other numbers of rows per slot may round otherwise: outputs are close, counts equal."""
    cases = [
        Case("replicas of some", 8, 2, (3, 0, 5, 1)[:world], 5, redundant=5),
        Case("of all, all want one", 8, 2, (70, 1, 33, 0)[:world], 1024, only=6, redundant=24),
    ]
    by_rank = run_ranks(run_cases, world, cases, KINDS)
    for number, case in enumerate(cases):
        expected, expected_counts = run_case(case, "local", ALONE)
        experts_LWS = case.placement(world).experts_LWS
        assert (experts_LWS != EMPTY).sum() > LAYERS * case.num_experts, "nothing is replicated"
        for which, kind in enumerate(KINDS):
            results = [by_rank[rank][number][which] for rank in range(world)]
            for layer in range(LAYERS):
                joined = torch.cat([outputs[layer] for outputs, _ in results])
                torch.testing.assert_close(
                    joined, expected[layer], rtol=1e-5, atol=1e-6, msg=f"{case.name}, {kind}"
                )
                counts = torch.zeros(case.num_experts, dtype=torch.int64)
                for rank, (_, counts_LS) in enumerate(results):
                    for slot, expert in enumerate(experts_LWS[layer, rank].tolist()):
                        assert expert != EMPTY or counts_LS[layer, slot] == 0
                        counts[expert] += counts_LS[layer, slot]
                assert torch.equal(counts, expected_counts[layer]), f"{case.name}, {kind}: counts differ"


def test_replicas_share_the_tokens_of_their_expert() -> None:
    case = Case("one expert, two replicas", 2, 1, (60, 60), 60, only=1, redundant=2)
    by_rank = run_ranks(run_cases, 2, [case], KINDS)
    for which, kind in enumerate(KINDS):
        counts = [by_rank[rank][0][which][1].sum(1).tolist() for rank in range(2)]
        assert counts == [[60, 60], [60, 60]], f"{kind}: tokens by rank and layer"


@pytest.mark.parametrize("device", [None, torch.device("cpu")])
def test_tables_on_a_device_keep_their_place_when_experts_get_replicas(device: torch.device | None) -> None:
    """Captured steps read them. Arrays are made anew at the first replicas."""
    plain = np.array([[[0, 1], [2, -1]], [[0, 1], [2, -1]]], np.int32)
    moved, replicas = plain.copy(), plain.copy()
    moved[0] = [[1, 0], [2, -1]]
    replicas[1, 1, 1] = 0
    choice = ReplicaChoice(Placement(plain, 3), 0, device=device)
    table, ids = choice._places, np.array([[0, 1], [0, 2]])

    def places(layer: int) -> list[list[int]]:
        choice.begin_step(2)
        found = choice.places_TK(ids if device is None else torch.from_numpy(ids), layer)
        return np.asarray(found).tolist()

    assert places(0) == places(1) == [[0, 1], [0, 2]]
    choice.place(Placement(moved, 3), [0])
    assert places(0) == [[1, 0], [1, 2]] and choice._places is table
    choice.place(Placement(replicas, 3), [1])
    mine = ReplicaChoice(Placement(replicas, 3), 0, device=device)
    mine.begin_step(2)
    wanted = mine.places_TK(ids if device is None else torch.from_numpy(ids), 1)
    assert places(1) == np.asarray(wanted).tolist()
    assert (choice._places is table) == (device is not None)
    choice.place(Placement(plain, 3), [1])
    assert places(1) == [[0, 1], [0, 2]]


def test_tables_without_room_for_replicas_have_one_turn() -> None:
    full = Placement(np.array([[[0, 1], [2, 3]]], np.int32), 4)
    assert ReplicaChoice(full, 0, device=torch.device("cpu"))._places.shape == (1, 4)


def test_consecutive_tokens_and_steps_take_turns() -> None:
    placement = Placement(np.array([[[0], [1], [0], [1]]], np.int32), 2)
    choice = ReplicaChoice(placement, 0, [0, 0, 1, 1])
    choice.begin_step(3)
    assert choice.places_TK(np.array([[0], [0], [1]]), 0).tolist() == [[0], [0], [1]]
    apart = ReplicaChoice(Placement(np.array([[[0], [1], [1], [2]]], np.int32), 3), 0)
    seen = []
    for _ in range(12):
        apart.begin_step(1)
        seen.append(apart.places_TK(np.array([[1]]), 0).item())
    assert (seen.count(1), seen.count(2)) == (6, 6)
