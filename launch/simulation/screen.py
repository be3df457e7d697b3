"""A simulation on the terminal: progress on standard error, then the report."""

from __future__ import annotations

import time

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..capacity.plan import CapacityPlan
from ..capacity.screen import table_of, time_text
from .report import SimulationReport, Spread
from .simulate import Progress as SimulationProgress

_EVERY = 10.0  # seconds between lines where there is no terminal
_BLINK = 0.1


class ProgressScreen:
    """A bar on a terminal; without one a line every ten seconds."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = _bar(console) if console.is_terminal else None
        self._began = time.monotonic()
        self._next = self._began + (_BLINK if self._bar else _EVERY)
        self._task = None if self._bar is None else self._bar.add_task("", total=1)

    def show(self, progress: SimulationProgress) -> None:
        """Shows progress if the last display is old enough; cheap otherwise."""
        now = time.monotonic()
        if now < self._next:
            return
        if self._bar is not None and self._task is not None:
            self._next = now + _BLINK
            self._bar.start()
            text = f"{progress.seconds:,.1f} s simulated"
            self._bar.update(self._task, completed=progress.answered, total=progress.asked, description=text)
            self._bar.refresh()
        else:
            self._next = now + _EVERY
            answered = f"{progress.answered:,} of {progress.asked:,} requests answered"
            line = f"{now - self._began:6.1f} s  {progress.seconds:,.1f} s simulated, {answered}"
            self._console.print(line, markup=False)

    def hide(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def _bar(console: Console) -> Progress:
    answered = TextColumn("{task.completed:,.0f} of {task.total:,.0f} requests answered")
    columns = (TextColumn("  {task.description}"), BarColumn(bar_width=24), answered, TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, auto_refresh=False)


def show_report(
    report: SimulationReport, plan: CapacityPlan, title: str, efficiency: float, console: Console
) -> None:
    """Prints tables for clients and cluster, then the limiting resource."""
    mesh = plan.setup.mesh
    ranks = "1 rank" if mesh.world == 1 else f"{mesh.world} ranks"
    console.print(
        f"[bold]{escape(title)}[/bold] under {escape(report.trace)}: {ranks} ({mesh.sizes}), simulated with "
        f"the real planner; steps run at {efficiency:g} of the speed of their floors (--efficiency)"
    )
    if not report.complete:
        console.print("[yellow]stopped early:[/yellow] results so far")
    console.print()
    console.print(_totals(report))
    console.print(_clients(report))
    console.print(_cluster(report))
    for line in plan.unsupported:
        console.print(f"[yellow]this version refuses to launch it:[/yellow] {escape(line)}")
    even = "" if report.experts else "uneven expert loads (--experts), "
    console.print(f"Not simulated: time of sockets, tokenising and HTTP, {even}answers that end early.")
    console.print(f"[bold]{escape(report.binds)}[/bold]")


def _totals(report: SimulationReport) -> Table:
    requests, tokens = report.requests, report.tokens
    table = table_of(f"{report.seconds:,.1f} s simulated", "", "total", "per second", "per rank")
    table.add_row(
        "prompt tokens",
        f"{tokens.input:,}",
        f"{tokens.input_per_second:,.0f}",
        f"{tokens.input_per_second_per_rank:,.0f}",
    )
    table.add_row(
        "output tokens",
        f"{tokens.output:,}",
        f"{tokens.output_per_second:,.0f}",
        f"{tokens.output_per_second_per_rank:,.0f}",
    )
    table.add_row(
        "requests finished",
        f"{requests.finished:,}",
        f"{requests.finished / max(report.seconds, 1e-9):,.1f}",
        "",
    )
    for name, count in (
        ("too long (400)", requests.refused),
        ("queue full (503)", requests.unavailable),
        ("still open", requests.open),
    ):
        if count:
            table.add_row(f"requests {name}", f"{count:,}", "", "")
    return table


def _clients(report: SimulationReport) -> Table:
    table = table_of("clients", "", "p50", "p90", "p99")
    _spread(table, "time to first token", report.time_to_first_token)
    _spread(table, "time between tokens", report.time_between_tokens)
    _spread(table, "wait in the queue", report.queue_wait)
    return table


def _cluster(report: SimulationReport) -> Table:
    steps, pages, measured = report.steps, report.pages, report.measured
    table = table_of(f"cluster: {steps.count:,} steps", "", "p50", "p90", "p99")
    _spread(table, "time of a step", steps.seconds)
    _spread(table, "sampled rows of a step", steps.rows, ",.0f")
    _spread(table, "computed tokens of a step", steps.tokens, ",.0f")
    _spread(table, "slowest rank / mean, predicted", steps.imbalance, ".3f")
    _spread(table, "planner, on this machine *", measured.planner)
    if experts := report.experts:
        table.add_section()
        table.add_row("expert load, fullest rank / mean", f"{experts.unbalanced:.3f}", "", "")
        table.add_row("the same after balancing", f"{experts.balanced:.3f}", "", "")
        table.add_row("the same in these steps", f"{experts.simulated:.3f}", "", "")
        table.add_row("expert slots received to balance", f"{experts.received:.1%}", "", "")
        table.add_row("most bytes a rank receives", f"{experts.received_bytes / 2**20:,.0f} MiB", "", "")
    table.add_section()
    table.add_row("time without a step", f"{steps.idle:.1%}", "", "")
    table.add_row("ranks wait for the slowest", f"{steps.waiting:.1%}", "", "")
    for name, share in report.bound.items():
        table.add_row(f"steps bound by {name}", f"{share:.1%}", "", "")
    table.add_row("KV pages in use, mean | peak", f"{pages.mean:.1%} | {pages.peak:.1%}", "", "")
    table.add_row("peak of a rank", f"{pages.peak_of_a_rank:.1%}", "", "")
    table.add_row("prefix tokens saved", f"{report.prefix.share:.1%}", "", "")
    table.add_row("preemptions", f"{report.preemptions:,}", "", "")
    limits = f"{1e3 * measured.limit_p50:g} ms p50, {1e3 * measured.limit_p99:g} ms p99"
    table.caption = (
        f"* results and plan, without sockets; goal with sockets at 72 ranks: {limits}. "
        f"Simulated in {measured.wall:,.1f} s"
    )
    table.caption_justify = "left"
    return table


def _spread(table: Table, name: str, spread: Spread, form: str | None = None) -> None:
    """Seconds, unless a format is given."""
    values = (spread.p50, spread.p90, spread.p99)
    table.add_row(
        name,
        *("-" if value is None else format(value, form) if form else time_text(value) for value in values),
    )
