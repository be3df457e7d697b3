"""Waits of a device are timed by its own clock, before and after, by every kind of group."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed import HashStore

from lockstep.parallel.collectives import CollectiveError, Collectives, Pending
from lockstep.parallel.device_waits import DeviceWaits
from lockstep.parallel.one_epoch import OneEpochGroup
from lockstep.parallel.rank_groups import RankGroups

CPU = torch.device("cpu")


class Told:
    """A device that does its work at once, and whose clock starts ``early`` before it wraps. A wait
    takes 3 ms, and 5 ms pass before each reading.
    """

    def __init__(self, early: int = 1 << 40) -> None:
        self.work: list[str] = []
        self._now = (1 << 63) - early
        self.waits = DeviceWaits(("stages", "experts", "stages"), CPU, self._add_time)

    def _add_time(self, totals_R: Tensor, place: int, sign: int) -> None:
        self.work.append("begin" if sign < 0 else "end")
        self._now += 5_000_000
        now = (self._now + (1 << 63)) % (1 << 64) - (1 << 63)
        with np.errstate(over="ignore"):
            totals_R.numpy()[place] += np.int64(sign) * np.int64(now)

    def wait(self, *_: Any) -> None:
        self.work.append("wait")
        self._now += 3_000_000

    def seconds(self) -> dict[str, float]:
        """As they are read at the end of a step."""
        return self.waits.since(self.waits.totals_R.numpy().copy())


def by_collective(told: Told, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Callable[[], Any]]:
    group = Collectives("experts of stage 0", 0, 2, HashStore(), 1.0, CPU)
    work: Any = SimpleNamespace(wait=told.wait)
    return group, lambda: group.wait(Pending("tokens", torch.ones(2), work))


def by_memory(told: Told, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Callable[[], Any]]:
    group = OneEpochGroup("experts", 0, 2, HashStore(), CPU)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(wait_event=told.wait))
    started: Any = object()
    return group, lambda: group.wait(started)


@pytest.mark.parametrize("early", [1 << 40, 20_000_000], ids=["", "wraps"])
@pytest.mark.parametrize("kind", [by_collective, by_memory])
def test_a_wait_is_timed_by_the_device(kind: Any, early: int, monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told(early)
    group, wait = kind(told, monkeypatch)
    groups = RankGroups(group)
    assert groups.roles == ("experts",)
    groups.time_waits(told.waits)
    wait()
    wait()
    assert told.work == ["begin", "wait", "end"] * 2
    assert told.seconds() == pytest.approx({"stages": 0.0, "experts": 0.016})
    wait()
    assert told.seconds() == pytest.approx({"stages": 0.0, "experts": 0.008}), "since the step before"
    assert group.waited == 0.0, "the host has not waited"


@pytest.mark.parametrize("kind", [by_collective, by_memory])
def test_a_host_waits_without_the_clock_of_a_device(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told()
    _, wait = kind(told, monkeypatch)
    wait()
    assert told.work == ["wait"]


def test_roles_are_added_up_apart() -> None:
    told = Told()
    for role in ("experts", "stages", "stages"):
        told.waits.begin(role)
        told.wait()
        told.waits.end(role)
    assert told.seconds() == pytest.approx({"stages": 0.016, "experts": 0.008})


def test_a_wait_that_fails_leaves_nothing_to_the_next_epoch() -> None:
    def fail() -> None:
        raise RuntimeError("a peer is gone")

    told, group = Told(), Collectives("experts of stage 0", 0, 2, HashStore(), 1.0, CPU)
    RankGroups(group).time_waits(told.waits)
    work: Any = SimpleNamespace(wait=told.wait)
    group.wait(Pending("tokens", torch.ones(2), work))
    assert told.seconds()["experts"] == pytest.approx(0.008)
    with pytest.raises(CollectiveError, match="a peer is gone"):
        group.wait(Pending("tokens", torch.ones(2), SimpleNamespace(wait=fail)))  # type: ignore[arg-type]
    assert told.waits.totals_R.numpy()[1] < -(1 << 62), "half of it is there"
    told.waits.clear()
    group.wait(Pending("tokens", torch.ones(2), work))
    assert told.seconds() == pytest.approx({"stages": 0.0, "experts": 0.008})
