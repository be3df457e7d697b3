"""A benchmark on the terminal: progress on standard error, then a table for each level."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..capacity.screen import table_of, time_text
from ..client.status_line import StatusLine
from ..simulation.report import Spread
from .figures import Figures, Round, percentiles
from .report import LevelResult
from .turn import TurnProgress

_TIMES = (("TTFT", "ttft"), ("ITL", "itl"), ("TPOT", "tpot"), ("end to end", "latency"))


class BenchScreen:
    """Shows the turn under way, and a line for each that has ended."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._line = StatusLine(console)

    def show(self, progress: TurnProgress) -> None:
        self._line.show(str(progress))

    def tell(self, progress: TurnProgress, found: Round) -> None:
        first = percentiles(request.ttft for request in found.finished).p50
        speed = f"{found.output_per_second:,.1f} output tokens/s, TTFT {_time(first)}"
        failed = f", {progress.failed:,} failed" if progress.failed else ""
        done = f"{progress.title}: {progress.finished:,} requests{failed}"
        self._console.print(f"{done}; {speed}", markup=False)

    def hide(self) -> None:
        self._line.hide()


def show_results(results: Sequence[LevelResult], about_limit: str, console: Console) -> None:
    """Prints a table for each level, with the other endpoint's figures below each and ratios, then
    a line about the limit.
    """
    levels: dict[str, list[LevelResult]] = {}
    for result in results:
        levels.setdefault(str(result.load), []).append(result)
    for name, members in levels.items():
        console.print(_table(name, members))
        for result in members:
            _show_troubles(result, console)
    console.print(f"limit: {about_limit}", markup=False)


def _table(name: str, members: Sequence[LevelResult]) -> Table:
    first, *others = members
    rounds = first.figures.rounds
    asked = f"{first.figures.asked:,} requests in {rounds} round{'s' if rounds > 1 else ''}"
    rated = ["ratio"] if first.ratios is not None else []
    table = table_of(f"{name}: {asked}", "", "p50", "p90", "p99", "limit", *rated)
    limit = first.limit
    limits = {} if limit is None else {"ttft": limit.ttft, "tpot": limit.tpot}
    for title, field in _TIMES:
        values = [_time(value) for value in _values(getattr(first.figures, field))]
        table.add_row(title, *values, _time(limits.get(field)), *_rated(first, field))
        for other in others:
            table.add_row(
                "  against", *(_time(value) for value in _values(getattr(other.figures, field))), ""
            )
    if first.load.rate is not None:
        table.add_row("sent late", *(_time(value) for value in _values(first.figures.lateness)))
    rates = (
        ("output tokens/s", "output_per_second", None if limit is None else limit.output_per_second),
        ("requests/s", "requests_per_second", None),
    )
    for title, field, bound in rates:
        value = _rate(getattr(first.figures, field))
        table.add_row(title, value, "", "", _rate(bound), *_rated(first, field))
        for other in others:
            table.add_row("  against", _rate(getattr(other.figures, field)))
    return table


def _show_troubles(result: LevelResult, console: Console) -> None:
    """Shows failures by kind, and notes on unreliable figures."""
    figures, where = result.figures, result.endpoint.url
    for kind, count in figures.errors.items():
        example = escape(figures.examples[kind])
        console.print(f"[yellow]{where}: {count:,} failed, {escape(kind)}:[/yellow] {example}")
    for line in notes(figures):
        console.print(f"[yellow]{where}:[/yellow] {line}")


def notes(figures: Figures) -> list[str]:
    """Lines on answers that are shorter than asked, or whose tokens the server did not count."""
    found = []
    if figures.short:
        found.append(f"{figures.short:,} of {figures.finished:,} answers are shorter than asked")
    if figures.without_usage:
        counted = f"{figures.without_usage:,} answers came without usage"
        found.append(f"{counted}; their tokens are counted by chunks, which may hold several")
    return found


def _rated(result: LevelResult, field: str) -> list[str]:
    if result.ratios is None:
        return []
    value = getattr(result.ratios, field)
    return ["-" if value is None else f"{value:.2f}"]


def _values(spread: Spread) -> tuple[float | None, float | None, float | None]:
    return spread.p50, spread.p90, spread.p99


def _time(seconds: float | None) -> str:
    return "-" if seconds is None else time_text(seconds)


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:,.2f}" if value < 100 else f"{value:,.0f}"
