"""Waits of a device are noted between two marks on its stream, by every kind of group."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed import HashStore

from lockstep.parallel.collectives import CollectiveError, Collectives, Pending
from lockstep.parallel.device_waits import DeviceWaits
from lockstep.parallel.one_epoch import OneEpochGroup
from lockstep.parallel.rank_groups import RankGroups

CPU = torch.device("cpu")


class Told:
    """Work of a stream, in the order in which it was given."""

    def __init__(self, recording: bool = False) -> None:
        self.work: list[str] = []
        self.waits: DeviceWaits[int] = DeviceWaits(self._mark, lambda: recording)

    def _mark(self) -> int:
        self.work.append("mark")
        return len(self.work)

    def wait(self, *_: Any) -> None:
        self.work.append("wait")


def by_collective(told: Told, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Callable[[], Any]]:
    group = Collectives("experts of stage 0", 0, 2, HashStore(), 1.0, CPU)
    work: Any = SimpleNamespace(wait=told.wait)
    return group, lambda: group.wait(Pending("tokens", torch.ones(2), work))


def by_memory(told: Told, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Callable[[], Any]]:
    group = OneEpochGroup("experts", 0, 2, HashStore(), CPU)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(wait_event=told.wait))
    started: Any = object()
    return group, lambda: group.wait(started)


@pytest.mark.parametrize("kind", [by_collective, by_memory])
def test_a_wait_is_noted_between_two_marks(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told()
    group, wait = kind(told, monkeypatch)
    RankGroups(group).note_waits(told.waits)
    wait()
    wait()
    assert told.work == ["mark", "wait", "mark"] * 2
    assert told.waits.take() == [("experts", 1, 3), ("experts", 4, 6)] and not told.waits.take()
    assert group.waited == 0.0, "the host has not waited"


@pytest.mark.parametrize("kind", [by_collective, by_memory])
def test_nothing_is_marked_in_a_recording(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told(recording=True)
    group, wait = kind(told, monkeypatch)
    RankGroups(group).note_waits(told.waits)
    wait()
    assert told.work == ["wait"] and not told.waits.take()


@pytest.mark.parametrize("kind", [by_collective, by_memory])
def test_a_host_waits_without_marks(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told()
    _, wait = kind(told, monkeypatch)
    wait()
    assert told.work == ["wait"]


def test_a_wait_that_fails_is_not_noted() -> None:
    def fail() -> None:
        raise RuntimeError("a peer is gone")

    told, group = Told(), Collectives("experts of stage 0", 0, 2, HashStore(), 1.0, CPU)
    group.device_waits = told.waits
    work: Any = SimpleNamespace(wait=fail)
    with pytest.raises(CollectiveError, match="a peer is gone"):
        group.wait(Pending("tokens", torch.ones(2), work))
    assert not told.waits.take()
