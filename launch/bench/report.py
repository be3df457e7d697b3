"""Results of a benchmark, and the rows of its files."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..capacity.plan import CapacityPlan
from ..simulation.report import Spread
from .endpoint import Endpoint
from .figures import Figures, Ratios, Round, figures_of, ratios
from .limit import Limit, limit_of
from .workload import OfferedLoad, Workload

ENDPOINTS = "url", "against"
ROWS, TABLE, REQUESTS, PLOT = "rows.jsonl", "rows.csv", "requests.jsonl", "plot.svg"

Row = dict[str, Any]


@dataclass(frozen=True)
class LevelResult:
    """A level of load at one endpoint. ``name``: the option that sets it. ``ratios``: to the other
    endpoint, None without one.
    """

    load: OfferedLoad
    name: str
    endpoint: Endpoint
    rounds: Sequence[Round]
    figures: Figures
    limit: Limit | None
    ratios: Ratios | None

    def row(self, workload: Workload, when: str) -> Row:
        """Times in milliseconds, rates per second. Text but for numbers; None: not known."""
        figures, limit = self.figures, self.limit
        row: Row = {
            "time": when,
            "endpoint": self.name,
            "url": self.endpoint.url,
            "model": self.endpoint.model,
            "version": self.endpoint.version,
            "concurrency": self.load.concurrency,
            "rate": self.load.rate,
            "input": workload.input,
            "shared": workload.shared,
            "output": workload.output,
            "seed": workload.seed,
            "rounds": figures.rounds,
            "requests": figures.asked,
            "finished": figures.finished,
            "failed": figures.failed,
            "errors": figures.errors,
            "short_answers": figures.short,
            "answers_without_usage": figures.without_usage,
            "cached_tokens": figures.cached_tokens,
            "seconds": round(figures.seconds, 3),
            "in_flight": round(figures.in_flight, 3),
            "output_tokens_per_s": round(figures.output_per_second, 3),
            "requests_per_s": round(figures.requests_per_second, 4),
        }
        for name, spread in self._spreads().items():
            row |= _columns(name, spread)
        row |= {
            "limit_output_tokens_per_s": limit and round(limit.output_per_second, 3),
            "limit_ttft_ms": limit and _milliseconds(limit.ttft),
            "limit_tpot_ms": limit and _milliseconds(limit.tpot),
            "limit_binds": limit and limit.binds,
        }
        names = {"output_per_second": "output_tokens_per_s", "requests_per_second": "requests_per_s"}
        for field in Ratios.__dataclass_fields__:
            value = None if self.ratios is None else getattr(self.ratios, field)
            name = names.get(field, "e2e" if field == "latency" else field)
            row[f"ratio_{name}"] = None if value is None else round(value, 4)
        return row

    def _spreads(self) -> dict[str, Spread]:
        figures = self.figures
        times = {"ttft": figures.ttft, "itl": figures.itl, "tpot": figures.tpot, "e2e": figures.latency}
        return times | {"late": figures.lateness}

    def request_rows(self) -> list[Row]:
        """One row per request: moments in seconds since the start of its round."""
        return [
            {
                "endpoint": self.name,
                "concurrency": self.load.concurrency,
                "rate": self.load.rate,
                "round": number,
                "due": round(request.due, 6),
                "sent": round(request.sent, 6),
                "chunks": [round(moment, 6) for moment in request.chunks],
                "tokens": request.tokens,
                "error": request.failure and str(request.failure.error),
            }
            for number, each in enumerate(self.rounds, start=1)
            for request in each.requests
        ]


def _columns(name: str, spread: Spread) -> Row:
    return {f"{name}_{share}_ms": _milliseconds(getattr(spread, share)) for share in ("p50", "p90", "p99")}


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(1000 * seconds, 4)


def results_of(
    rounds: Mapping[tuple[OfferedLoad, int], Sequence[Round]],
    endpoints: Sequence[Endpoint],
    workload: Workload,
    plan: CapacityPlan | None,
) -> list[LevelResult]:
    """The levels that have rounds, in order. ``plan``: of the first endpoint."""
    results = []
    for load in workload.loads:
        places = [place for of, place in rounds if of == load]
        seen = {place: figures_of(rounds[load, place], workload.output) for place in places}
        for place, figures in sorted(seen.items()):
            limit = rated = None
            if place == 0 and plan is not None:
                limit = limit_of(plan, workload, load.concurrency or figures.in_flight)
            if place == 0 and 1 in seen:
                rated = ratios(figures, seen[1])
            found = rounds[load, place]
            results.append(
                LevelResult(load, ENDPOINTS[place], endpoints[place], found, figures, limit, rated)
            )
    return results


def write_rows(folder: Path, rows: Sequence[Row], results: Sequence[LevelResult]) -> None:
    """Writes the files ``ROWS``, ``TABLE`` and ``REQUESTS``. Raises OSError."""
    _write_lines(folder / ROWS, rows)
    _write_lines(folder / REQUESTS, [row for result in results for row in result.request_rows()])
    with (folder / TABLE).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(row | {"errors": errors_text(row["errors"])} for row in rows)


def _write_lines(path: Path, rows: Sequence[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def errors_text(errors: Mapping[str, int]) -> str:
    """Kinds of failures with their number."""
    return ", ".join(f"{kind}: {count}" for kind, count in errors.items())
