"""Compares two runs of the evaluation case by case: ``python -m lockstep.recipes.demo.compare
BEFORE.json AFTER.json``.

Only cases that flip carry information about the difference. Given their number, gains are binomial.
The interval is Clopper and Pearson's (Biometrika 26, 1934); the test is McNemar's, exact.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from math import comb, exp, log, log1p
from pathlib import Path
from typing import Any

LEAST = 2000  # fewest cases for a comparison worth quoting
CONFIDENCE = 0.95
ALARM = 0.5  # points


@dataclass(frozen=True)
class Flips:
    """Changes among ``total`` cases. ``lost``: right before, wrong after; ``gained``: wrong before,
    right after.
    """

    lost: int
    gained: int
    total: int

    @property
    def difference(self) -> float:
        """After minus before, in points."""
        return 100 * (self.gained - self.lost) / self.total

    def interval(self) -> tuple[float, float]:
        """Interval of the difference, in points, given the number of flips."""
        flips = self.lost + self.gained
        low, high = proportion_interval(self.gained, flips)
        return 100 * flips * (2 * low - 1) / self.total, 100 * flips * (2 * high - 1) / self.total

    def chance(self) -> float:
        """Probability of flips at least this uneven if neither run is better."""
        flips, fewer = self.lost + self.gained, min(self.lost, self.gained)
        ways: int = sum(comb(flips, count) for count in range(fewer + 1))
        return min(1.0, float(2 * ways / 2**flips))


def proportion_interval(hits: int, total: int) -> tuple[float, float]:
    """Exact confidence interval of a proportion."""
    tail = (1 - CONFIDENCE) / 2
    low = 0.0 if hits == 0 else _solve(lambda p: _at_most(total - hits, total, 1 - p) - tail)
    high = 1.0 if hits == total else _solve(lambda p: tail - _at_most(hits, total, p))
    return low, high


def _at_most(hits: int, total: int, p: float) -> float:
    """Probability of at most ``hits`` of ``total``. Computed from logarithms: binomial coefficients
    of a thousand exceed a float.
    """
    return sum(
        exp(log(comb(total, count)) + count * log(p) + (total - count) * log1p(-p))
        for count in range(hits + 1)
    )


def _solve(rising: Any) -> float:
    """The zero of a rising function on [0, 1]."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return (low + high) / 2


def flips(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> dict[str, Flips]:
    """Flips by family, and for ``all``. Raises ValueError if the runs did not ask the same
    cases.
    """
    old_cases, new_cases = (
        [(answer["family"], answer["question"], answer["wanted"]) for answer in run]
        for run in (before, after)
    )
    if old_cases != new_cases:
        raise ValueError(
            "the two files hold answers to different cases; use the same --cases, --seed and --longest"
        )
    found = {}
    for family in [*dict.fromkeys(answer["family"] for answer in before), "all"]:
        pairs = [
            (old["passed"], new["passed"])
            for old, new in zip(before, after, strict=True)
            if family in ("all", old["family"])
        ]
        found[family] = Flips(pairs.count((True, False)), pairs.count((False, True)), len(pairs))
    return found


def verdict(whole: Flips) -> str:
    low = whole.interval()[0]
    if whole.chance() >= 1 - CONFIDENCE:
        return f"no significant difference; a loss above {max(0.0, -low):.2f} points is unlikely"
    if whole.difference > 0:
        return f"a significant gain of {whole.difference:.2f} points"
    remark = ", to be explained" if -whole.difference > ALARM else ""
    return f"a significant loss of {-whole.difference:.2f} points{remark}"


def report(found: dict[str, Flips]) -> str:
    """A line per family, and the verdict."""
    lines = []
    for family, each in found.items():
        low, high = each.interval()
        difference = f"{each.difference:+.2f} points [{low:+.2f}, {high:+.2f}]"
        lines.append(
            f"{family:12} lost {each.lost:4}  gained {each.gained:4}  of {each.total:5}  {difference}"
        )
    return "\n".join([*lines, f"p = {found['all'].chance():.3g}: {verdict(found['all'])}"])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Compare two runs of the demo's evaluation.")
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    args = parser.parse_args()
    try:
        found = flips(
            json.loads(args.before.read_text(encoding="utf-8")),
            json.loads(args.after.read_text(encoding="utf-8")),
        )
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    print(report(found))
    if found["all"].total < LEAST:
        print(f"{found['all'].total} cases are few: ask at least {LEAST}")


if __name__ == "__main__":
    main()
