"""Arrays of the host go to a GPU from pinned memory, and the host does not wait."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lockstep.kernels.host_arrays import to_device


def test_an_array_keeps_its_values_whatever_its_strides() -> None:
    array = np.arange(12).reshape(3, 4)[:, ::2]
    assert to_device(array, torch.device("cpu")).tolist() == array.tolist()


def test_a_gpu_copies_from_pinned_memory_without_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    pinned = SimpleNamespace(to=lambda device, non_blocking: told.append((device, non_blocking)))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned)
    card = torch.device("cuda", 1)
    to_device(np.arange(3), card)
    assert told == [(card, True)]
