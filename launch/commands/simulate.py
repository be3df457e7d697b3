"""``launch simulate``: a recipe under a trace, without a cluster. Exit status: 0 simulated, 1 not
to its end, 2 a bad recipe or trace.
"""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer
from rich.console import Console

from ...engine.simulation.simulation import Stuck
from ..capacity.plan import plan_recipe
from ..recipe.file import load_recipe
from ..recipe.recipe import RecipeError, contradictions
from ..simulation.screen import ProgressScreen, show_report
from ..simulation.simulate import EFFICIENCY, Progress, simulate_plan
from ..simulation.trace import BLOCK, TraceError, read_trace
from ..terminal.interrupts import Interrupts

simulate_app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@simulate_app.command()
def simulate(
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", help="A recipe file, or the name of a packaged recipe.")
    ],
    trace: Annotated[
        str,
        typer.Option(
            "--trace",
            "-t",
            help="A file of JSON lines with timestamp (ms), input_length, output_length and hash_ids, as the Mooncake traces have, "
            "or poisson:rate=20,input=2000,output=300,count=2000[,seed=0] (requests a second, tokens, tokens, requests).",
        ),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Override keys of the recipe.")
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print the report for a program; times in seconds, shares from 0 to 1."),
    ] = False,
    speed: Annotated[
        float, typer.Option(min=1e-6, max=1e6, help="Requests arrive so many times as fast.")
    ] = 1.0,
    requests: Annotated[int | None, typer.Option(min=1, help="Only so many of the trace, its first.")] = None,
    block: Annotated[
        int, typer.Option(min=1, max=1 << 20, help="Tokens of a block that hash_ids name.")
    ] = BLOCK,
    efficiency: Annotated[
        float,
        typer.Option(
            min=0.01,
            max=1.0,
            help="At what share of the speed of its floor, which launch plan prints, a step runs: published figures for DeepSeek-V3 reach "
            "0.24 to 0.50 of theirs, 0.31 in the median (benchmarks/plan_anchors.md). 1 is the floor itself.",
        ),
    ] = EFFICIENCY,
) -> None:
    """Serves a trace of requests on a cluster that is not there: the planner, its KV pages and its
    queue are those that serve; what a step takes comes from the floors of launch plan. Ctrl-C
    prints what was simulated so far.
    """
    err, interrupts = Console(file=sys.stderr, highlight=False, soft_wrap=True), Interrupts()
    try:
        parsed, path = load_recipe(recipe, overrides or (), contradictions)
        plan = plan_recipe(parsed, path.parent)
        asked = read_trace(trace, requests, speed, block)
    except (RecipeError, TraceError) as error:
        err.print(f"error: {error}", markup=False)
        raise typer.Exit(2) from None
    if not plan.fits:
        for line in plan.misfits:
            err.print(f"error: does not fit: {line}", markup=False)
        raise typer.Exit(1)
    interrupts.install()
    screen = ProgressScreen(err)

    def told(progress: Progress) -> bool:
        screen.show(progress)
        return interrupts.count > 0

    try:
        try:
            report = simulate_plan(plan, parsed, asked, efficiency, told)
        finally:
            screen.hide()  # or the terminal is left without a cursor
    except Stuck as error:
        err.print(f"error: {error}", markup=False)
        raise typer.Exit(1) from None
    try:
        if as_json:
            options = {"speed": speed, "efficiency": efficiency, "block": block}
            print(json.dumps({"recipe": path.name} | options | report.to_json(), indent=2), flush=True)
        else:
            show_report(report, plan, path.stem, efficiency, Console(highlight=False, soft_wrap=True))
    except BrokenPipeError:  # nobody reads it any more, which needs no message
        raise
    except OSError as error:
        err.print(f"error: the report cannot be written: {error.strerror}", markup=False)
        raise typer.Exit(1) from None
    raise typer.Exit(0 if report.complete else 1)
