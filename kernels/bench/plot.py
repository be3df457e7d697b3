"""Draws rows of the benchmark against their rooflines: ``python -m lockstep.kernels.bench.plot [CSV
...]``.

Writes one SVG per file and family of ops, beside the file: time over roofline, a line per
implementation; 1 is the limit of the measured ceilings. Rows without a time are left out and
counted in the title.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .rows import FOLDER, Ledger, Row

FAMILIES = {
    "experts": ("experts", "experts_fp8"),
    "attention": ("attend", "mla_attend"),
    "sampler": ("sample", "logprobs", "edit_logits", "penalise", "allow_only"),
    "rows": (),  # all other ops
}
_COLUMNS, _PANEL = 3, (5.2, 3.0)


def draw(path: Path) -> list[Path]:
    """Writes the plots of a CSV file and returns their paths."""
    rows = Ledger(path).rows()
    named = {op for ops in FAMILIES.values() for op in ops}
    written = []
    for family, ops in FAMILIES.items():
        mine = [row for row in rows if (row.op in ops if ops else row.op not in named)]
        if any(row.measured for row in mine):
            written.append(path.with_name(f"{path.stem}_{family}.svg"))
            _draw_family(mine, written[-1])
    return written


def _draw_family(rows: Sequence[Row], path: Path) -> None:
    panels: dict[str, list[Row]] = {}
    for row in rows:
        panels.setdefault(_panel(row), []).append(row)
    panels = {title: members for title, members in panels.items() if any(row.measured for row in members)}
    count = -(-len(panels) // _COLUMNS)
    # The same rows give the same file, with text as text.
    matplotlib.rcParams |= {"svg.hashsalt": "lockstep", "svg.fonttype": "none"}
    figure = Figure(
        figsize=(_PANEL[0] * min(_COLUMNS, len(panels)), _PANEL[1] * count + 0.6), layout="constrained"
    )
    axes = figure.subplots(count, min(_COLUMNS, len(panels)), squeeze=False).flatten()
    for axis, (title, members) in zip(axes, panels.items(), strict=False):
        _draw_panel(axis, title, members)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    first = next(row for row in rows if row.measured)
    one = f"1 = copy {first.copy_gb_s} GB/s or matmul {first.matmul_tflop_s} TFLOP/s"
    versions = f"torch {first.torch}, triton {first.triton}, {first.commit}"
    figure.suptitle(f"{first.hardware}: time over roofline ({one}); {versions}", fontsize=9)
    figure.savefig(path, format="svg", metadata={"Date": None})


def _panel(row: Row) -> str:
    """Title of a row's panel. A panel shows an op at one model and context, with numbers of tokens
    or rows along its axis; all extends of a model share one.
    """
    if " over " in row.shape:
        return f"{row.op}: {row.shape.partition(':')[0]}"
    several = re.sub(r"[0-9]+ (tokens|x)\b", r"n \1", row.shape, count=1)
    return f"{row.op}: {several}"


def _draw_panel(axis: Axes, title: str, rows: Sequence[Row]) -> None:
    shapes = list(dict.fromkeys(row.shape for row in rows))
    labels = [_label(shape) for shape in shapes]
    missing = 0
    for name in dict.fromkeys(row.implementation for row in rows):
        mine = [row for row in rows if row.implementation == name]
        points = {
            row.shape: 1 / float(row.share) for row in mine if row.measured and float(row.share or 0) > 0
        }
        missing += sum(not row.measured for row in mine)
        at = [place for place, shape in enumerate(shapes) if shape in points]
        axis.plot(at, [points[shapes[place]] for place in at], marker="o", markersize=3, label=name)
    axis.axhline(1.0, color="black", linewidth=0.8)
    axis.set_yscale("log")
    axis.set_xticks(range(len(shapes)), labels, fontsize=7)
    axis.set_title(f"{title}{f' ({missing} not measured)' if missing else ''}", fontsize=8)
    axis.legend(fontsize=6)


def _label(shape: str) -> str:
    if " over " in shape:
        return shape.partition(": ")[2]
    found = re.search(r"([0-9]+) (?:tokens|x)\b", shape)
    return found.group(1) if found else shape[:12]


if __name__ == "__main__":
    for source in [Path(name) for name in sys.argv[1:]] or sorted(FOLDER.glob("kernels_?pu.csv")):
        print(*draw(source), sep="\n")
