"""Times of the device, in both columns."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from lockstep.kernels.reference import clock as reference
from lockstep.kernels.triton import clock as triton_clock
from support.kernels.poison import DEVICE

COLUMNS = pytest.mark.parametrize("column", [reference, triton_clock], ids=["reference", "triton"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="the card has a clock of its own")
@COLUMNS
def test_what_passes_between_two_readings_is_added(
    column: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two spans that overlap, as those of two streams do, at a place of several."""
    times = iter([1 << 62, (1 << 62) + 5, (1 << 62) + 11, (1 << 62) + 40])
    monkeypatch.setattr(reference, "host_time", lambda: next(times))
    totals = torch.tensor([7, 3, 7])
    for sign in (-1, -1, 1, 1):
        column.add_time(totals, 1, sign)
    assert totals.tolist() == [7, 3 + 11 + 40 - 5, 7]


@COLUMNS
def test_time_goes_on(column: ModuleType) -> None:
    totals = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    column.add_time(totals, 0, -1)
    column.add_time(totals, 0, 1)
    assert 0 <= totals[0] < 100_000_000_000 and totals[1] == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card")
def test_a_recording_reads_the_clock_each_time() -> None:
    """A pause of a million cycles takes half a millisecond at 2 GHz."""
    totals = torch.zeros(1, dtype=torch.int64, device="cuda")
    triton_clock.add_time(totals, 0, 1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        triton_clock.add_time(totals, 0, -1)
        torch.cuda._sleep(1_000_000)
        triton_clock.add_time(totals, 0, 1)
    totals.zero_()
    found = []
    for _ in range(4):
        graph.replay()
        found.append(int(totals))
    spans = [after - before for before, after in zip([0, *found], found, strict=False)]
    assert all(200_000 < each < 10_000_000 for each in spans), spans
