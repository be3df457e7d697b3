"""Draws a benchmark: rates and times over the levels of load, the limit beside them."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from .report import Row

_COLOURS = ("#1f77b4", "#d62728")
_PANELS = (
    ("output tokens/s", "output_tokens_per_s", None, "limit_output_tokens_per_s"),
    ("TTFT, ms: p50, dashed p99", "ttft_p50_ms", "ttft_p99_ms", "limit_ttft_ms"),
    ("TPOT, ms: p50, dashed p99", "tpot_p50_ms", "tpot_p99_ms", "limit_tpot_ms"),
)


def can_draw() -> bool:
    """Whether matplotlib is installed, an extra."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(path: Path, title: str, rows: Sequence[Row]) -> None:
    """Writes an SVG; the same rows give the same file. A line per endpoint; grey: the limit of the
    first.
    """
    import matplotlib
    from matplotlib.figure import Figure

    level = "concurrency" if rows[0]["rate"] is None else "rate"
    urls = {row["endpoint"]: row["url"] for row in rows}
    with matplotlib.rc_context({"svg.hashsalt": "lockstep", "svg.fonttype": "none"}):
        figure = Figure(figsize=(13, 3.8), layout="constrained")
        for axes, (name, middle, high, limit) in zip(figure.subplots(1, 3), _PANELS, strict=True):
            for colour, (endpoint, url) in zip(_COLOURS, urls.items(), strict=False):
                mine = sorted(
                    (row for row in rows if row["endpoint"] == endpoint), key=lambda row: row[level]
                )
                levels = [row[level] for row in mine]
                axes.plot(levels, _numbers(mine, middle), "o-", color=colour, label=url)
                if high is not None:
                    axes.plot(levels, _numbers(mine, high), "o--", color=colour, linewidth=0.8)
                if any(row[limit] is not None for row in mine):
                    axes.plot(levels, _numbers(mine, limit), ":", color="grey", label="limit")
            axes.set_title(name, loc="left", fontsize=10)
            axes.set_xlabel(level if level == "concurrency" else "requests/s offered")
            axes.set_yscale("log")  # the limit may be far away
            axes.spines[["top", "right"]].set_visible(False)
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
        figure.suptitle(title, fontsize=9)
        figure.savefig(path, format="svg", metadata={"Date": None})


def _numbers(rows: Sequence[Row], name: str) -> list[float]:
    return [float("nan") if row[name] is None else row[name] for row in rows]
