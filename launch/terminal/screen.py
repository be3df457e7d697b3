"""Output on the terminal while a cluster starts, serves and stops."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from ...engine.protocol.cluster_state import Report
from ..log_lines import line_start

_WIDE = 100  # columns of a terminal
_NEWS_SECONDS = 10.0  # between lines on one process that compiles


class Screen:
    """Shows progress bars on a terminal until the cluster is ready, else a line per new phase, in
    the form of a log.

    The ready text goes to standard output, the rest to standard error.
    """

    def __init__(self) -> None:
        self._out = Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self._err = Console(file=sys.stderr, highlight=False, soft_wrap=True)
        self._start = time.monotonic()
        self._last = self._start
        self._phases: list[str] = []
        self._bars: dict[str, TaskID] = {}
        self._seen: dict[str, tuple[str, str]] = {}
        self._told: dict[str, float] = {}
        bar = 24 if self._err.width >= _WIDE else 8
        self._phase_width = max(8, min(60, self._err.width - bar - 26))  # beside name, bar and time
        name = TextColumn("  {task.description:<14}")
        phase = TextColumn("{task.fields[phase]}")
        columns = (name, BarColumn(bar_width=bar), phase, TimeElapsedColumn())
        self._progress = Progress(*columns, console=self._err, transient=True)
        self._live = self._err.is_terminal

    def say(self, text: str) -> None:
        """Prints a line with the time: since the start on a terminal, else as logs have it."""
        if not self._err.is_terminal:
            self._err.print(line_start(time.time(), "INFO", "launch") + text, markup=False)
            return
        self._err.print(f"[dim]{time.monotonic() - self._start:6.1f} s[/dim]  {escape(text)}")

    def error(self, text: str) -> None:
        self.hide()
        self._err.print(f"[bold red]error:[/bold red] {escape(text)}")

    def mark_part(self, phase: str, seconds: float) -> None:
        """Ends a phase that took ``seconds`` of those since the last mark."""
        self._phases.append(f"{phase} {seconds:.1f}")
        self._last += seconds

    def mark(self, phase: str, note: str = "") -> None:
        """Ends a phase of the start, for the timeline."""
        now = time.monotonic()
        self._phases.append(f"{phase} {now - self._last:.1f}" + (f" ({note})" if note else ""))
        self._last = now

    def show(self, name: str, report: Report) -> None:
        """Shows the report of a process."""
        now = report.phase, report.detail if report.phase == "ready" else ""
        changed = self._seen.get(name) != now
        self._seen[name] = now
        if not self._live:
            moment = time.monotonic()
            if changed:
                self._told[name] = moment
            elif report.phase == "compiling" and moment - self._told[name] > _NEWS_SECONDS:
                self._told[name], changed = moment, True
            if changed and report.phase in ("compiling", "loading", "ready"):
                self.say(f"{name}: {report.phase}" + (f" ({report.detail})" if report.detail else ""))
            return
        self._progress.start()
        if name not in self._bars:
            self._bars[name] = self._progress.add_task(name, total=1.0, phase="")
        done = 1.0 if report.phase == "ready" else report.fraction
        phase = f"{report.phase} {report.detail}"[: self._phase_width]
        self._progress.update(self._bars[name], completed=done, phase=escape(phase))

    def hide(self) -> None:
        """Ends the progress display."""
        self._live = False
        if self._bars:
            self._progress.stop()

    def ready(self, url: str, elsewhere: str | None, model: str, api_key: str | None) -> None:
        """Prints the URL, the timeline of the start and two examples of use.

        ``elsewhere``: the server's URL for other hosts.
        """
        self.hide()
        total = time.monotonic() - self._start
        header = f" \\\n  -H 'Authorization: Bearer {api_key}'" if api_key else ""
        message = '{"role": "user", "content": "Hello"}'
        body = f'{{"model": "{model}", "messages": [{message}], "max_tokens": 32}}'
        self._out.print(
            f"\nready: {url}/v1 serves {model} after {total:.1f} s ({', '.join(self._phases)})\n"
            f"{f'from other hosts: {elsewhere}/v1' + chr(10) if elsewhere else ''}\n"
            f"curl {url}/v1/chat/completions -H 'Content-Type: application/json'{header} \\\n"
            f"  -d '{body}'\n\n"
            "from openai import OpenAI\n"
            f'client = OpenAI(base_url="{url}/v1", api_key="{api_key or "none"}")\n'
            f'for chunk in client.chat.completions.create(model="{model}", stream=True, max_tokens=32,\n'
            '                                            messages=[{"role": "user", "content": "Hello"}]):\n'
            '    print(chunk.choices[0].delta.content or "", end="", flush=True)\n\n'
            "Ctrl-C drains and stops; a second one stops at once.",
            markup=False,
        )
        sys.stdout.flush()
