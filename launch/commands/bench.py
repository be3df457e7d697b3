"""``launch bench``: measures a server under offered load, alone or beside another one."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .app import app
from .options import (
    ApiKeyEnv,
    ModelName,
    Overrides,
    Silence,
    answers,
    fitting_plan,
    messages,
    refusal,
    server_for,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..bench.endpoint import Endpoint
    from ..bench.report import LevelResult, Row
    from ..bench.workload import OfferedLoad, Workload
    from ..capacity.plan import CapacityPlan
    from ..client.server import Server

_LEVELS = "1,8,32"
_MOST_PROMPT_TOKENS = 1 << 28  # per round; drawn before it begins
_MOST_IN_FLIGHT, _MOST_PER_SECOND, _MOST_LEVELS = 10_000, 100_000.0, 20

_Url = typer.Option("--url", metavar="URL", help="Server to measure, such as http://127.0.0.1:8000.")
_Concurrency = typer.Option(
    metavar="N,...", help=f"Levels of load: requests in flight. Default: {_LEVELS}, without --rate."
)
_Rate = typer.Option(
    metavar="R,...",
    help="Levels of load: requests per second, as a Poisson process, whatever the server does.",
)
_Requests = typer.Option(
    min=1,
    max=1_000_000,
    help="Requests of a round. Default: 4 for each in flight, at least 8; with --rate those of 30 seconds.",
)
_Rounds = typer.Option(min=1, max=1000, help="Rounds of each level; with --against in turns.")
_Input = typer.Option("--input", min=1, max=1 << 24, help="Tokens of each prompt.")
_Output = typer.Option("--output", min=1, max=1 << 24, help="Tokens of each answer.")
_Shared = typer.Option(
    min=0.0, max=1.0, help="Share of a prompt that all prompts of a round begin with; the rest is random."
)
_Seed = typer.Option(min=0, help="Seed of prompts and arrivals.")
_Other = typer.Option("--against", metavar="URL", help="Another server, to compare with in the same run.")
_OtherKey = typer.Option(metavar="NAME", help="Environment variable with that server's API key.")
_OtherModel = typer.Option(help="Model to ask that server. Default: the first listed.")
_Recipe = typer.Option(
    "--recipe", "-r", help="Recipe that --url serves: shows the limit of its model and hardware."
)
_Vocab = typer.Option(
    min=2, max=1 << 24, help="Prompts are token ids below this. Default: the vocabulary that servers report."
)
_Out = typer.Option("--out", "-o", metavar="FOLDER", help="Folder for rows, requests and a plot.")


@app.command()
def bench(
    url: Annotated[str, _Url],
    overrides: Overrides = None,
    concurrency: Annotated[str | None, _Concurrency] = None,
    rate: Annotated[str | None, _Rate] = None,
    requests: Annotated[int | None, _Requests] = None,
    rounds: Annotated[int, _Rounds] = 3,
    input_tokens: Annotated[int, _Input] = 256,
    output_tokens: Annotated[int, _Output] = 128,
    shared: Annotated[float, _Shared] = 0.0,
    seed: Annotated[int, _Seed] = 0,
    against: Annotated[str | None, _Other] = None,
    recipe: Annotated[str | None, _Recipe] = None,
    vocab: Annotated[int | None, _Vocab] = None,
    out: Annotated[Path | None, _Out] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
    api_key_env: ApiKeyEnv = None,
    model: ModelName = None,
    against_key_env: Annotated[str | None, _OtherKey] = None,
    against_model: Annotated[str | None, _OtherModel] = None,
    timeout: Silence = 120.0,
) -> None:
    """Measure a server: time to first token, between tokens and end to end, tokens and requests per
    second, at several levels of load, beside another server and the limit of its hardware.

    launch bench --url URL --concurrency 1,8,32 --recipe R --out FOLDER

    launch bench --url URL --rate 0.5,2 --against URL

    Exit status: 0 every request answered, 1 some not, or stopped, 2 bad input or refused by the
    server, 3 server unreachable.
    """
    import asyncio

    from ..bench.workload import Workload
    from ..client.server import ServerError

    if recipe is None and overrides:
        raise refusal(f"{overrides[0]}: overrides a recipe; --recipe names none")
    if against is None and (against_key_env or against_model):
        raise refusal("--against-key-env and --against-model go with --against URL")
    loads = _loads(concurrency, rate, requests, input_tokens)
    workload = Workload(loads, input_tokens, output_tokens, round(shared * input_tokens), rounds, seed)
    planned = _planned(recipe, overrides or [], input_tokens + output_tokens)
    if out is not None:
        _check_folder(out)
    servers = [(server_for(url, timeout, api_key_env, ("--url", "--api-key-env")), model)]
    if against is not None:
        options = "--against", "--against-key-env"
        servers.append((server_for(against, timeout, against_key_env, options), against_model))
    try:
        results, broken = asyncio.run(_measure(servers, workload, vocab, planned))
    except ServerError as error:
        raise refusal(error, 2 if error.asked_wrongly else 3) from None
    _report(results, workload, _about_limit(planned), out, as_json)
    if broken:
        messages().print(f"stopped early: {broken}", markup=False)
    raise typer.Exit(1 if broken or any(result.figures.failed for result in results) else 0)


# --------------------------------------------------------------------------- options


def _loads(
    concurrency: str | None, rate: str | None, requests: int | None, length: int
) -> tuple[OfferedLoad, ...]:
    """``length``: tokens of a prompt."""
    from ..bench.workload import OfferedLoad, default_requests

    if concurrency is not None and rate is not None:
        raise refusal("give one of --concurrency and --rate")
    loads = []
    if rate is not None:
        for level in _levels("--rate", rate, _MOST_PER_SECOND, whole=False):
            loads.append(OfferedLoad(requests or default_requests(None, level), rate=level))
    else:
        text = _LEVELS if concurrency is None else concurrency
        for level in map(int, _levels("--concurrency", text, _MOST_IN_FLIGHT, whole=True)):
            if requests is not None and requests < level:
                raise refusal(f"--requests {requests}: fewer than --concurrency {level}; should be as many")
            loads.append(OfferedLoad(requests or default_requests(level, None), concurrency=level))
    if (most := max(load.requests for load in loads)) * length > _MOST_PROMPT_TOKENS:
        allowed = f"should be at most {_MOST_PROMPT_TOKENS:,} prompt tokens a round"
        raise refusal(f"--input {length}: {most:,} requests (--requests) of so many; {allowed}")
    return tuple(loads)


def _levels(option: str, text: str, most: float, *, whole: bool) -> list[float]:
    """Different numbers above 0, separated by commas."""
    kind = "whole numbers from 1" if whole else "numbers above 0"
    allowed = f"should be {kind} to {most:,.0f}, each once, separated by commas"
    try:
        levels = [float(int(part)) if whole else float(part) for part in text.split(",")]
    except ValueError:
        raise refusal(f"{option} {text}: {allowed}") from None
    wrong = any(not math.isfinite(level) or not 0 < level <= most for level in levels)
    if wrong or len(set(levels)) < len(levels):
        raise refusal(f"{option} {text}: {allowed}")
    if len(levels) > _MOST_LEVELS:
        raise refusal(f"{option}: {len(levels)} levels; should be at most {_MOST_LEVELS}")
    return levels


def _check_folder(folder: Path) -> None:
    """Makes the folder; called before any request."""
    from ..bench.plot import can_draw
    from ..bench.report import ROWS

    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / ROWS).exists():
            raise refusal(f"--out {folder}: holds {ROWS} of an earlier run; should be another folder")
        (folder / ROWS).touch()
        (folder / ROWS).unlink()
    except OSError as error:
        raise refusal(f"--out {folder}: cannot be written: {error.strerror}") from None
    if not can_draw():
        messages().print("no plot will be drawn: matplotlib is not installed (pip install matplotlib)")


@dataclass(frozen=True)
class _Planned:
    """The plan of the recipe that ``--url`` serves, the name of its model and of its hardware."""

    plan: CapacityPlan
    model: str
    hardware: str


def _planned(name: str | None, overrides: list[str], context: int) -> _Planned | None:
    """None without a recipe; exits with 2 if it cannot be used."""
    if name is None:
        return None
    plan, recipe = fitting_plan(name, overrides, context)
    served = recipe.model.served_name or Path(recipe.model.path).name
    return _Planned(plan, served, recipe.cluster.hardware or "cpu")


# --------------------------------------------------------------------------- the run


async def _measure(
    servers: Sequence[tuple[Server, str | None]],
    workload: Workload,
    vocab: int | None,
    planned: _Planned | None,
) -> tuple[list[LevelResult], str]:
    """Results, and the reason for an early end. Raises ServerError while nothing is measured."""
    from ..bench.endpoint import find
    from ..bench.report import results_of
    from ..bench.run import Bench
    from ..bench.screen import BenchScreen
    from ..terminal.stop_event import stop_event

    endpoints = [await find(server, wanted) for server, wanted in servers]
    if planned is not None and planned.model != endpoints[0].model:
        raise refusal(  # the limit of another model would mislead
            f"--recipe: its model is {planned.model}, {endpoints[0].url} serves {endpoints[0].model}; "
            f"model.served_name={endpoints[0].model} declares them the same"
        )
    longest = workload.input + workload.output
    for endpoint in endpoints:
        if endpoint.max_len is not None and longest > endpoint.max_len:
            allowed = f"{endpoint.url} serves at most {endpoint.max_len:,} tokens"
            raise refusal(f"--input {workload.input} and --output {workload.output}: {allowed}")
    screen = BenchScreen(messages())
    _announce(endpoints, workload)
    made = Bench(endpoints, workload, _vocab_size(endpoints, vocab), screen.show, screen.tell)
    _allow_sockets()
    try:
        with stop_event() as stop:
            await made.run(stop)
    finally:
        screen.hide()
    return results_of(
        made.rounds, endpoints, workload, None if planned is None else planned.plan
    ), made.broken


def _announce(endpoints: Sequence[Endpoint], workload: Workload) -> None:
    for endpoint in endpoints:
        text = f"{endpoint.url} serves {endpoint.model}, version {endpoint.version}"
        messages().print(text, markup=False)
    loads = ", ".join(f"{load} ({load.requests:,} requests)" for load in workload.loads)
    messages().print(f"{workload}; {workload.rounds} rounds of {loads}", markup=False)


def _vocab_size(endpoints: Sequence[Endpoint], given: int | None) -> int:
    """The smallest vocabulary that the servers report."""
    told = [endpoint.vocab_size for endpoint in endpoints if endpoint.vocab_size is not None]
    silent = " and ".join(endpoint.url for endpoint in endpoints if endpoint.vocab_size is None)
    if given is not None:
        return given
    if not told:
        raise refusal(f"--vocab: missing, and {silent} does not report its vocabulary at /tokenizer_info")
    if silent:
        text = f"{silent} reports no vocabulary; prompts use ids below {min(told):,} there too (--vocab)"
        messages().print(text, markup=False)
    return min(told)


def _about_limit(planned: _Planned | None) -> str:
    if planned is None:
        return "not known; --recipe names the recipe that the server runs"
    return f"floors of launch plan at the peak rates of cluster.hardware = {planned.hardware}"


def _allow_sockets() -> None:
    """Raises the limit of open files as far as allowed: each request has a socket."""
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _report(
    results: Sequence[LevelResult], workload: Workload, about_limit: str, out: Path | None, as_json: bool
) -> None:
    from datetime import UTC, datetime

    from ..bench.screen import show_results

    when = datetime.now(UTC).isoformat(timespec="seconds")
    rows = [result.row(workload, when) for result in results]
    if as_json:
        print(json.dumps(rows, indent=2), flush=True)
    elif results:
        show_results(results, about_limit, answers())
    if out is not None and rows:
        _write(out, rows, results, workload)


def _write(out: Path, rows: Sequence[Row], results: Sequence[LevelResult], workload: Workload) -> None:
    from ..bench.plot import can_draw, draw
    from ..bench.report import PLOT, write_rows

    try:
        write_rows(out, rows, results)
        if can_draw():
            draw(out / PLOT, str(workload), rows)
    except OSError as error:
        raise refusal(f"--out {out}: {error.strerror}", 1) from None
    names = ", ".join(sorted(path.name for path in out.iterdir()))
    messages().print(f"{out}: {names}", markup=False)
