"""Transfers between host and device, with a device that is slow to come past its marks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lockstep.engine.rank.device import transfers
from lockstep.engine.rank.device.transfers import Download, Fetched, HostCopies, Upload

CPU = torch.device("cpu")


class Slow:
    """A mark that is passed when somebody waits for it."""

    def __init__(self) -> None:
        self.passed = False

    def query(self) -> bool:
        return self.passed

    def synchronize(self) -> None:
        self.passed = True


def test_arrays_of_all_dtypes_arrive_in_order_at_the_same_addresses() -> None:
    upload = Upload(1024, CPU)
    first = [np.array([1, 2, 3], np.int32), np.array([-5, 1 << 40]), np.array([0.5], np.float32)]
    second = [np.array([7, 8, 9], np.int32), np.array([4, 5]), np.array([2.5], np.float32)]
    addresses = [[each.data_ptr() for each in upload.send(arrays)] for arrays in (first, second)]
    assert addresses[0] == addresses[1] and all(address % 8 == 0 for address in addresses[0])
    sent = upload.send([*second, np.zeros((0, 2), np.int64), np.arange(6).reshape(2, 3)])
    assert [each.tolist() for each in sent] == [[7, 8, 9], [4, 5], [2.5], [], [[0, 1, 2], [3, 4, 5]]]
    assert [each.dtype for each in sent[:3]] == [torch.int32, torch.int64, torch.float32]


def test_what_does_not_fit_is_an_error_with_both_sizes() -> None:
    with pytest.raises(AssertionError, match="80 bytes, room for 64"):
        Upload(64, CPU).send([np.arange(10)])


def test_memory_that_is_still_read_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    marks: list[Slow] = []

    def slow(device: torch.device) -> Slow:
        marks.append(Slow())
        return marks[-1]

    monkeypatch.setattr(transfers, "mark", slow)
    upload = Upload(64, CPU)
    for number in range(6):
        upload.send([np.array([number])])
    assert [mark.passed for mark in marks] == [True, True, False, False, False, False], "a ring of four"


def test_what_is_fetched_keeps_its_values() -> None:
    source = torch.tensor([1, 2])
    fetched = Download(64, CPU, HostCopies()).fetch([source, torch.zeros(0)])
    source.zero_()
    assert fetched.arrived and [each.tolist() for each in fetched.wait()] == [[1, 2], []]
    late = Slow()
    assert not Fetched([source], late).arrived and Fetched([source], late).wait()[0].tolist() == [0, 0]
    assert late.passed
