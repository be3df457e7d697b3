"""Collectives over gloo: values, epochs, and what is said when a peer is gone or late."""

from __future__ import annotations

import pytest
import torch

from lockstep.parallel.collectives import Collectives
from support.parallel.collective_calls import all_kinds, one_dies, one_is_late, with_vacancies
from support.parallel.gloo_ranks import DEADLINE, run_ranks


def test_values_in_every_epoch() -> None:
    size = 3
    for rank, epochs in enumerate(run_ranks(all_kinds, size, 3)):
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


@pytest.mark.parametrize("vacant", [(1,), (0, 3), (0, 1, 3)])
def test_a_group_meets_without_its_vacant_positions(vacant: tuple[int, ...]) -> None:
    size = 4
    present = [rank for rank in range(size) if rank not in vacant]
    by_rank = run_ranks(with_vacancies, size, vacant)
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


def test_the_death_of_a_peer_is_an_error_at_once() -> None:
    with pytest.raises(AssertionError, match=r"^rank 2: died without a word"):
        run_ranks(one_dies, 3)


def test_a_late_peer_is_an_error_at_the_deadline() -> None:
    told = run_ranks(one_is_late, 2)
    text, seconds = told[0]
    assert "rank 0 waited for tokens of MoE layer 3" in text and "of 5 s" in text, text
    assert 4.5 < seconds < DEADLINE / 2, "at its own deadline, however slow the machine, and not at another"
