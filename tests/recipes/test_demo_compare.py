"""The comparison of two runs of the demo's evaluation."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lockstep.recipes.demo.compare import Flips, flips, proportion_interval, report, verdict


def answers(passed: list[bool], family: str = "a") -> list[dict[str, Any]]:
    return [
        {"family": family, "question": str(number), "wanted": "", "passed": each}
        for number, each in enumerate(passed)
    ]


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    [
        (0, 10, 0.0, 0.3085),
        (10, 10, 0.6915, 1.0),
        (5, 10, 0.1871, 0.8129),
        (1, 20, 0.0013, 0.2487),
    ],  # Clopper-Pearson, from tables
)
def test_exact_intervals(hits: int, total: int, low: float, high: float) -> None:
    assert proportion_interval(hits, total) == pytest.approx((low, high), abs=1e-4)


def test_the_interval_of_many_is_near_the_normal_one() -> None:
    spread = 1.96 * (0.96 * 0.04 / 2000) ** 0.5
    assert proportion_interval(1920, 2000) == pytest.approx((0.96 - spread, 0.96 + spread), abs=1e-3)


def test_flips_by_family() -> None:
    before = answers([True, True, False, False]) + answers([True], "b")
    after = answers([True, False, True, False]) + answers([False], "b")
    assert flips(before, after) == {"a": Flips(1, 1, 4), "b": Flips(1, 0, 1), "all": Flips(2, 1, 5)}


def test_other_cases_are_refused() -> None:
    with pytest.raises(ValueError, match="different cases"):
        flips(answers([True, True]), answers([True]))


def test_mcnemar() -> None:
    assert Flips(0, 0, 100).chance() == 1.0
    assert Flips(1, 9, 100).chance() == pytest.approx(2 * 11 / 1024)
    assert Flips(9, 1, 100).chance() == Flips(1, 9, 100).chance()


def test_the_verdict_names_a_clear_loss_or_gain() -> None:
    loss = Flips(40, 4, 2000)
    assert verdict(loss) == "a significant loss of 1.80 points, to be explained"
    assert loss.interval()[1] < 0 < -loss.interval()[0]
    assert verdict(Flips(4, 40, 2000)) == "a significant gain of 1.80 points"
    assert verdict(Flips(7, 5, 2000)).startswith("no significant difference")
    assert Flips(7, 5, 2000).interval()[0] < 0 < Flips(7, 5, 2000).interval()[1]


def test_the_command(tmp_path: Path) -> None:
    for name, passed in (("one.json", [True] * 30), ("two.json", [True] * 20 + [False] * 10)):
        (tmp_path / name).write_text(json.dumps(answers(passed)))
    arguments = [sys.executable, "-m", "lockstep.recipes.demo.compare", "one.json", "two.json"]
    found = subprocess.run(
        arguments, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert "lost   10  gained    0  of    30  -33.33 points" in found
    assert f"p = {2 / 2**10:.3g}" in found
    assert math.isclose(2 / 2**10, 0.00195, abs_tol=1e-5)
    assert "30 cases are few" in found


def test_a_report_has_a_line_per_family_and_a_verdict() -> None:
    before, after = answers([True] * 8 + [False]), answers([True] * 7 + [False, True])
    lines = report(flips(before, after)).splitlines()
    assert [line.split() for line in lines[:2]] == [
        [name, "lost", "1", "gained", "1", "of", "9", *line.split()[7:]]
        for name, line in zip(("a", "all"), lines, strict=False)
    ]
    assert "no significant difference" in lines[2]
