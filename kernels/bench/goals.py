"""Compares a card's rows with the goals set for them: ``python -m lockstep.kernels.bench.goals
[CSV]``.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .rows import FOLDER, Ledger, Row

# Two ways to quantise an activation to FP8 differ by a few hundredths.
_LARGEST_ERROR = 0.06


@dataclass(frozen=True)
class Goal:
    """A goal for rows of the Triton column: ``figure`` should reach ``least``."""

    name: str
    least: float
    concerns: Callable[[Row], bool]
    figure: Callable[[Row], float]


def _tokens(row: Row) -> int:
    found = re.search(r": (\d+) tokens", row.shape)
    return int(found.group(1)) if found else 0


GOALS = (
    Goal(
        "attention decode, share of the copy bandwidth",
        0.8,
        lambda row: row.op in ("attend", "mla_attend") and " decode" in row.shape,
        lambda row: float(row.of_copy),
    ),
    Goal(
        "experts of up to 64 tokens, share of the copy bandwidth",
        0.8,
        lambda row: row.op.startswith("experts") and 0 < _tokens(row) <= 64,
        lambda row: float(row.of_copy),
    ),
    Goal(
        "experts of 4096 tokens, share of the matmul rate",
        0.6,
        lambda row: row.op.startswith("experts") and _tokens(row) == 4096,
        lambda row: float(row.of_matmul),
    ),
)


def summary(rows: Sequence[Row]) -> str:
    """Markdown: a line per goal and rival, then every row that misses a goal, worst first."""
    ours = [row for row in rows if row.implementation == "triton"]
    missing = sum(not row.measured for row in ours)
    cards = sorted({row.hardware for row in ours if row.measured})
    lines = [f"# Goals on {', '.join(cards) or 'no card yet'}", ""]
    lines += [f"{len(ours) - missing} of {len(ours)} cases measured.", ""]
    lines += ["| goal | least | met | median | worst |", "|---|---|---|---|---|"]
    missed: list[str] = []
    for goal in GOALS:
        figures = [(goal.figure(row), row) for row in ours if goal.concerns(row) and row.measured]
        lines.append(
            _line(goal.name, goal.least, [figure for figure, _ in figures], sum(map(goal.concerns, ours)))
        )
        late = sorted(
            (figure, row.op, row.shape, row.bound) for figure, row in figures if figure < goal.least
        )
        missed += [
            f"- {goal.name}: {op} {shape}: {figure:.2f} ({bound})" for figure, op, shape, bound in late
        ]
    for rival, ratios in _against(rows).items():
        lines.append(_line(f"time of {rival} over ours", 1.0, [ratio for ratio, *_ in ratios], len(ratios)))
        missed += [
            f"- behind {rival}: {op} {shape}: {ratio:.2f}"
            for ratio, op, shape in sorted(ratios)
            if ratio < 1.0
        ]
    wrong = [
        f"- error {row.error}: {row.op} {row.shape}"
        for row in ours
        if row.error and not float(row.error) < _LARGEST_ERROR
    ]
    lines += ["", "Missed:" if missed else "Nothing measured misses a goal.", *missed, *wrong]
    return "\n".join(lines) + "\n"


def _line(name: str, least: float, figures: list[float], total: int) -> str:
    ordered = sorted(figures)
    known = "not measured | not measured"
    if ordered:
        known = f"{ordered[len(ordered) // 2]:.2f} | {ordered[0]:.2f}"
    return f"| {name} | {least} | {sum(figure >= least for figure in figures)} of {total} | {known} |"


def _against(rows: Sequence[Row]) -> dict[str, list[tuple[float, str, str]]]:
    """Per rival: its time over ours, op and shape."""
    ours = {
        (row.op, row.shape): float(row.p50_us)
        for row in rows
        if row.implementation == "triton" and row.measured
    }
    ratios: dict[str, list[tuple[float, str, str]]] = {}
    for row in rows:
        if row.implementation not in ("triton", "cpu") and row.measured and (row.op, row.shape) in ours:
            ratio = float(row.p50_us) / ours[row.op, row.shape]
            ratios.setdefault(row.implementation, []).append((ratio, row.op, row.shape))
    return ratios


if __name__ == "__main__":
    print(summary(Ledger(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER / "kernels_gpu.csv").rows()))
