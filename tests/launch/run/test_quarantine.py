"""Nodes that are suspect: by the deaths of their ranks, and by no others."""

from __future__ import annotations

from lockstep.launch.cluster.cluster import Death, Place, Task
from lockstep.launch.run.quarantine import DEATHS, Quarantine
from lockstep.launch.run.replacements import WINDOW_SECONDS
from lockstep.parallel.recovery import SPENT_STATUS


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def death(index: int, node: int | None, lost_with: str = "", role: str = "rank", code: int = -9) -> Death:
    return Death(Task(role, index, b"", node=node), Place("host", 1, ""), code, "", lost_with)


def suspects(quarantine: Quarantine, *deaths: Death) -> list[int | None]:
    return [last.task.node for each in deaths for last in quarantine.take([each])]


def test_a_node_is_suspect_once_after_some_deaths_of_any_of_its_ranks() -> None:
    quarantine = Quarantine(Clock())
    assert suspects(quarantine, *(death(index, 2) for index in range(DEATHS - 1))) == []
    assert suspects(quarantine, death(7, 2)) == [2]
    assert suspects(quarantine, *(death(index, 2) for index in range(DEATHS - 1))) == []
    assert suspects(quarantine, death(7, 2)) == [2], "and again after as many"


def test_deaths_all_over_the_cluster_make_no_node_suspect() -> None:
    quarantine = Quarantine(Clock())
    assert suspects(quarantine, *(death(index, index % 2) for index in range(10 * DEATHS))) == []


def test_deaths_of_long_ago_do_not_count() -> None:
    clock = Clock()
    quarantine = Quarantine(clock)
    for index in range(3 * DEATHS):
        assert suspects(quarantine, death(index, 1)) == []
        clock.now += 1 + WINDOW_SECONDS / (DEATHS - 1)


def test_ranks_that_end_because_another_was_lost_do_not_count() -> None:
    """One of eight dies; the exchange of the others cannot go on without it."""
    quarantine = Quarantine(Clock())
    assert suspects(quarantine, death(3, 1), *(death(rank, 1, code=SPENT_STATUS) for rank in range(8))) == []


def test_neither_lost_withs_nor_other_roles_nor_ranks_that_are_moved_count() -> None:
    quarantine = Quarantine(Clock())
    assert suspects(quarantine, *(death(index, 1, lost_with="host") for index in range(DEATHS))) == []
    assert suspects(quarantine, *(death(0, None, role="controller") for _ in range(DEATHS))) == []
    quarantine.moves([f"rank {index}" for index in range(DEATHS)])
    assert suspects(quarantine, *(death(index, 1) for index in range(DEATHS))) == []
    assert suspects(quarantine, *(death(index, 1) for index in range(DEATHS))) == [1], "moved once"
