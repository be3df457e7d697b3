"""Masks beside the steps: one that takes long costs its own row, never the step."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from lockstep.engine.rank import masks as masks_module
from lockstep.engine.rank.masks import Bits, Filler, Masks


class Row:
    """A row whose mask is its slot's number in every word. A ``stuck`` one computes or waits."""

    def __init__(self, slot: int, stuck: str = "") -> None:
        self.slot = slot
        self.error = ""
        self._stuck = stuck
        self.released = threading.Event()

    def fill(self, bits_W: Bits) -> None:
        while self._stuck == "computes" and not self.released.is_set():
            pass
        if self._stuck == "waits":
            self.released.wait()
        bits_W[:] = self.slot


@pytest.fixture
def filler() -> Iterator[Filler]:
    made = Filler()
    yield made
    made.close()


def take(filler: Filler, rows: list[Row], slots: list[int]) -> tuple[list[int], Bits]:
    numbers, bits_SW = Masks(filler, rows, np.zeros((len(rows), 3), np.int32)).take(np.array(slots, np.int64))
    return numbers.tolist(), bits_SW


def test_masks_come_in_the_order_of_the_slots(filler: Filler) -> None:
    numbers, bits_SW = take(filler, [Row(4), Row(7), Row(9)], [9, 1, 4])
    assert (numbers, bits_SW.tolist()) == ([0, 2], [[9] * 3, [4] * 3])


@pytest.mark.parametrize("kind", ["computes", "waits"])
def test_a_mask_that_takes_long_costs_its_own_row(
    filler: Filler, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masks_module, "MASK_CPU_SECONDS", 0.1 if kind == "computes" else 100)
    monkeypatch.setattr(masks_module, "MASK_SECONDS", 0.1 if kind == "waits" else 100)
    rows = [Row(1), Row(2, kind), Row(3), Row(4, kind), Row(5)]
    try:
        numbers, bits_SW = take(filler, rows, [5, 4, 3, 2, 1])
        assert numbers == [0, 1, 2, 3, 4]
        assert bits_SW[:, 0].tolist() == [5, -1, 3, -1, 1]
        assert [bool(row.error) for row in rows] == [False, True, False, True, False]
        assert "took too long" in rows[1].error
        assert take(filler, [Row(6)], [6])[1][:, 0].tolist() == [6], "the next step has a thread"
    finally:
        for row in rows:
            row.released.set()


def test_a_mask_that_others_keep_from_the_cpu_is_waited_for(
    filler: Filler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masks_module, "MASK_CPU_SECONDS", 0.1)
    row = Row(1, "waits")
    threading.Timer(0.3, row.released.set).start()
    began = time.monotonic()
    assert take(filler, [row], [1])[1][:, 0].tolist() == [1]
    assert not row.error
    assert time.monotonic() - began > 0.2


def test_a_standstill_of_the_process_is_no_time_of_a_mask(
    filler: Filler, monkeypatch: pytest.MonkeyPatch
) -> None:
    row, now = Row(1, "waits"), time.monotonic
    threading.Timer(0.2, monkeypatch.setattr, (time, "monotonic", lambda: now() + 100.0)).start()
    threading.Timer(0.5, row.released.set).start()
    assert take(filler, [row], [1])[1][:, 0].tolist() == [1]
    assert not row.error and time.monotonic() - now() > 99.0


def test_an_exception_of_a_mask_is_not_lost(filler: Filler) -> None:
    class Broken(Row):
        def fill(self, bits_W: Bits) -> None:
            raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        take(filler, [Broken(1)], [1])
