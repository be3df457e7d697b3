"""Collectives over gloo and through shared memory: values, epochs, and what is said when a peer is
gone or late.
"""

from __future__ import annotations

import pytest
import torch

from lockstep.parallel.collectives import Collectives
from support.parallel.collective_calls import (
    all_kinds,
    one_dies,
    one_dies_before_it_reads,
    one_is_late,
    one_leaves,
    same_calls_twice,
    sum_in_order,
    sums_of_ranks,
    through_memory,
    time_of_a_wait,
    with_vacancies,
)
from support.parallel.gloo_ranks import DEADLINE, run_ranks

WAYS = pytest.mark.parametrize("memory", [True, False], ids=["memory", "gloo"])


@WAYS
def test_values_in_every_epoch(memory: bool) -> None:
    size = 3
    for rank, epochs in enumerate(run_ranks(all_kinds, size, 3, memory=memory)):
        for found in epochs:
            assert found["equal"].flatten().tolist() == [
                10 * peer + 2 * rank + i for peer in range(size) for i in range(2)
            ]
            assert found["ragged"].tolist() == [
                [float(peer)] * 3 for peer in range(size) for _ in range(rank + 1)
            ]
            assert found["gathered"].flatten().tolist() == [
                10 * peer + i for peer in range(size) for i in range(2)
            ]
            assert found["reduced"].flatten().tolist() == [30 + size * (2 * rank + i) for i in range(2)]
            assert found["summed"].flatten().tolist() == [30 + size * i for i in range(2 * size)]
            assert found["spread"].flatten().tolist() == list(range(2 * size))


@WAYS
@pytest.mark.parametrize("vacant", [(1,), (0, 3), (0, 1, 3)])
def test_a_group_meets_without_its_vacant_positions(vacant: tuple[int, ...], memory: bool) -> None:
    size = 4
    present = [rank for rank in range(size) if rank not in vacant]
    by_rank = run_ranks(with_vacancies, size, vacant, memory=memory)
    for rank in present:
        found = by_rank[rank]
        own = [10 * rank + i for i in range(2 * size)]
        assert found["equal"].view(size, 2).tolist() == [
            own[2 * peer : 2 * peer + 2] if peer in vacant else [10 * peer + 2 * rank + i for i in range(2)]
            for peer in range(size)
        ]
        assert found["ragged"].tolist() == [[float(peer)] * 3 for peer in present for _ in range(rank + 1)]
        assert found["gathered"].view(size, 2).tolist() == [
            [-1, -1] if peer in vacant else [10 * peer, 10 * peer + 1] for peer in range(size)
        ]
        assert found["reduced"].flatten().tolist() == [
            10 * sum(present) + len(present) * (2 * rank + i) for i in range(2)
        ]


def test_a_group_of_one_moves_nothing() -> None:
    alone = Collectives("alone", 0, 1, None, 1.0, torch.device("cpu"))
    found = all_kinds(alone, 2)[1]
    assert (
        found["equal"].flatten().tolist() == found["reduced"].flatten().tolist() == [0, 1]
        and alone.waited == 0
    )


@WAYS
def test_the_death_of_a_peer_is_an_error_at_once(memory: bool) -> None:
    *told, none = run_ranks(one_dies, 3, memory=memory, mortal=True)
    assert none is None
    for rank, (text, seconds) in enumerate(told):
        assert f"rank {rank} waited for tokens of MoE layer 3" in text, text
        assert not memory or text.endswith("rank 2 is gone"), text
        assert seconds < DEADLINE / 4


def test_the_leave_of_a_peer_is_an_error_at_once() -> None:
    *told, _ = run_ranks(one_leaves, 3)
    for text, seconds in told:
        assert text.endswith("rank 2 is gone") and seconds < DEADLINE / 4, text


def test_the_death_of_a_peer_that_has_yet_to_read_is_an_error_at_once() -> None:
    text, _ = run_ranks(one_dies_before_it_reads, 2, mortal=True)
    assert "rank 0 started message 4: rank 1 is gone" in text


@WAYS
def test_a_late_peer_is_an_error_at_the_deadline(memory: bool) -> None:
    told = run_ranks(one_is_late, 2, memory=memory)
    text, seconds = told[0]
    assert "rank 0 waited for tokens of MoE layer 3" in text and "of 5 s" in text, text
    assert not memory or text.endswith("rank 1 has not come"), text
    assert 4.5 < seconds < DEADLINE / 2, "at its own deadline, however slow the machine, and not at another"


@pytest.mark.parametrize("size", [2, 4])
def test_memory_gives_the_bits_of_gloo_whatever_the_sizes(size: int) -> None:
    assert run_ranks(same_calls_twice, size, 120) == [[]] * size


def test_sums_through_memory_are_in_the_order_of_ranks() -> None:
    expected = sum_in_order(4)
    for rank, (total, run) in enumerate(run_ranks(sums_of_ranks, 4)):
        assert torch.equal(total, expected) and torch.equal(run[0], expected[rank])


def test_a_rank_that_waits_long_leaves_its_core_to_others() -> None:
    *waits, _ = run_ranks(time_of_a_wait, 3)
    for seconds, busy in waits:
        assert seconds > 1 and busy < seconds / 5


def test_memory_is_shared_where_all_are_on_one_host_and_nothing_is_left_of_it() -> None:
    for shared, lines, left in run_ranks(through_memory, 3):
        assert shared and lines == ["test/1: small exchanges through shared memory"] and not left


def test_all_ranks_go_over_tcp_if_one_sees_no_memory_of_others() -> None:
    for rank, (shared, lines, left) in enumerate(run_ranks(through_memory, 3, 1)):
        assert not shared and not left
        [line] = lines
        assert line.startswith("test/1: exchanges over TCP: rank 1 does not reach the memory of all others")
        assert ("/dev/null" in line) == (rank == 1), "the reason stands in the log of the rank that has it"
