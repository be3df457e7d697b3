"""Collectives over gloo: values, epochs, and what is said when a peer is gone or late."""

from __future__ import annotations

import pytest
import torch

from lockstep.parallel.collectives import Collectives
from support.parallel.collective_calls import all_kinds, one_dies, one_is_late
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
