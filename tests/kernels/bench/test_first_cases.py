"""The cases that a card measures first, and their comparison with the reference."""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lockstep.kernels.bench.call import Call, Case
from lockstep.kernels.bench.cases import cases
from lockstep.kernels.bench.first import first_cases
from lockstep.kernels.bench.parity import ALLOWED, compare


def test_about_forty_cover_what_decides_speed() -> None:
    chosen = first_cases()
    assert 35 <= len(chosen) <= 45 and all(case.card for case in chosen)
    assert len({(case.op, case.shape) for case in chosen}) == len(chosen)
    count = Counter(case.op for case in chosen)
    assert count["attend"] == count["mla_attend"] == 8 and count["experts_fp8"] == 6
    assert {"experts", "linear_fp8", "sample", "gate", "permute", "add_rms_norm_fp8"} <= set(count)
    assert len(list(cases())) > 5 * len(chosen)


def test_kernels_that_err_or_fail_are_told_and_others_compared() -> None:
    x = torch.tensor([3.0, 4.0])

    def case(name: str, own: Callable[[], Tensor]) -> Case:
        return Case("add", name, lambda device: Call(lambda ops: own, 1.0, expected=lambda: x))

    def broken() -> Tensor:
        raise RuntimeError("illegal address\nat line 3")

    listed = [case("far", lambda: x * 1.5), case("broken", broken), case("near", lambda: x * 1.01)]
    unequalled = replace(
        listed[2], op="copy_pages", make=lambda device: Call(lambda ops: lambda: x, 1.0, expected=None)
    )
    text, cpu = io.StringIO(), torch.device("cpu")
    assert compare([*listed, unequalled], cpu, math.inf, text) == 1
    _, *rows = csv.reader(text.getvalue().splitlines())
    assert [row[1:] for row in rows[:3]] == [
        ["far", "5.0e-01", str(ALLOWED), "too large"],
        ["broken", "", str(ALLOWED), "RuntimeError: illegal address"],
        ["near", "1.0e-02", str(ALLOWED), "ok"],
    ]
    assert rows[3][-1] == "nothing to compare with"
    assert compare([listed[2]], cpu, math.inf, text) == 0
    assert compare([listed[0]], cpu, -math.inf, text) == 0
    assert text.getvalue().rstrip().endswith("out of time")
