"""Traffic on the terminal: progress on standard error, then measured beside simulated."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..capacity.screen import table_of, time_text
from ..simulation.report import SimulationReport, Spread
from .load_record import LoadRecord, LoadReport
from .status_line import StatusLine


class LoadProgress:
    """Shows the progress of a trace."""

    def __init__(self, console: Console) -> None:
        self._line = StatusLine(console)

    def show(self, record: LoadRecord, seconds: float) -> None:
        self._line.show(
            f"{seconds:,.1f} s: {record.sent:,} of {record.asked:,} requests sent, {record.open:,} open, "
            f"{record.finished:,} finished, {record.failed:,} failed, {record.output_tokens:,} tokens"
        )

    def hide(self) -> None:
        self._line.hide()


def show_load(
    report: LoadReport, simulated: SimulationReport | None, examples: Mapping[str, str], console: Console
) -> None:
    """Prints times and rates, simulated ones beside them if there are any, then errors by kind."""
    console.print(f"{escape(report.trace)}: {report.sent:,} of {report.asked:,} requests sent")
    if not report.complete:
        console.print("[yellow]stopped early:[/yellow] results so far")
    table = table_of("clients", "", "p50", "p90", "p99")
    table.add_row("time to first token", *_times(report.time_to_first_token))
    if simulated is not None:
        table.add_row("  simulated", *_times(simulated.time_to_first_token))
    table.add_row("time between tokens", *_times(report.time_between_tokens))
    if simulated is not None:
        table.add_row("  simulated", *_times(simulated.time_between_tokens))
    table.add_row("sent later than due", *_times(report.lateness))
    table.add_row("tokens/s of a request", *map(_figure, _values(report.token_rate)))
    console.print(table)
    console.print(_totals(report, simulated))
    for kind, count in report.errors.items():
        console.print(f"[yellow]{count:,} failed, {escape(kind)}:[/yellow] {escape(examples[kind])}")
    if simulated is not None:
        if not simulated.complete:
            console.print("[yellow]simulation stopped early[/yellow]")
        console.print("Not simulated: time of sockets, tokenising and HTTP, uneven expert loads.")


def _totals(report: LoadReport, simulated: SimulationReport | None) -> Table:
    columns = [("measured", _measured_totals(report))]
    if simulated is not None:
        columns.append(("simulated", _simulated_totals(simulated)))
    names = ("output tokens/s", "prompt tokens/s", "requests finished", "requests failed", "requests open")
    table = table_of("throughput", "", *(title for title, _ in columns))
    figures = zip(*(column for _, column in columns), strict=True)
    for name, row in zip((*names, "prefix tokens saved", "seconds"), figures, strict=True):
        table.add_row(name, *row)
    return table


def _measured_totals(report: LoadReport) -> list[str]:
    return [
        f"{report.output_per_second:,.1f}",
        f"{report.input_per_second:,.1f}",
        f"{report.finished:,}",
        f"{report.failed:,}",
        f"{report.open:,}",
        f"{report.cached_tokens / max(1, report.measured_input_tokens):.1%}",
        f"{report.seconds:,.1f}",
    ]


def _simulated_totals(report: SimulationReport) -> list[str]:
    tokens, requests = report.tokens, report.requests
    return [
        f"{tokens.output_per_second:,.1f}",
        f"{tokens.input_per_second:,.1f}",
        f"{requests.finished:,}",
        f"{requests.refused + requests.unavailable:,}",
        f"{requests.open:,}",
        f"{report.prefix.share:.1%}",
        f"{report.seconds:,.1f}",
    ]


def _values(spread: Spread) -> tuple[float | None, float | None, float | None]:
    return spread.p50, spread.p90, spread.p99


def _times(spread: Spread) -> list[str]:
    return ["-" if value is None else time_text(value) for value in _values(spread)]


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"
