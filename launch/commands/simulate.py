"""``launch simulate``: serves a request trace on a simulated cluster, in virtual time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..defaults import BLOCK, EFFICIENCY
from .app import app
from .options import ArrivalSpeed, HashBlock, Overrides, RecipeName, answers, messages, refusal

if TYPE_CHECKING:
    from ..capacity.plan import CapacityPlan
    from ..recipe.recipe import Recipe
    from ..simulation.experts import ExpertBalance
    from ..simulation.report import SimulationReport
    from ..simulation.simulate import Progress
    from ..simulation.trace import Trace


_Trace = typer.Option(
    "--trace",
    "-t",
    help="File with one JSON object per line: timestamp (ms), input_length, output_length, "
    "hash_ids, as in the Mooncake traces. Or generated requests: "
    "poisson:rate=20,input=2000,output=300,count=2000[,seed=0] "
    "(requests/s, tokens, tokens, requests).",
)
_Json = typer.Option("--json", help="Print JSON: times in seconds, shares from 0 to 1.")
_Requests = typer.Option(min=1, help="Simulate only the first so many.")
_Experts = typer.Option(
    "--experts",
    help="Expert loads: a file as experts.loads takes it, or lognormal:sigma=1,drift=0.1,seed=0. Steps "
    "take as long as on the experts of the start, with experts.balance=on as on balanced ones.",
)
_Efficiency = typer.Option(
    min=0.01,
    max=1.0,
    help="Speed of a step as a share of its floor's, which launch plan prints; 1 is the floor. "
    "Published figures for DeepSeek-V3 reach 0.24 to 0.50, 0.31 in the median "
    "(benchmarks/plan_anchors.md).",
)


@app.command()
def simulate(
    recipe: RecipeName,
    trace: Annotated[str, _Trace],
    overrides: Overrides = None,
    as_json: Annotated[bool, _Json] = False,
    speed: ArrivalSpeed = 1.0,
    requests: Annotated[int | None, _Requests] = None,
    block: HashBlock = BLOCK,
    efficiency: Annotated[float, _Efficiency] = EFFICIENCY,
    experts: Annotated[str | None, _Experts] = None,
) -> None:
    """Serve a request trace on a simulated cluster.

    Planner, KV pages and queue are the ones that serve; only the time of a step is computed, from
    the floors of launch plan. Ctrl-C prints the results so far.

    Exit status: 0 simulated to the end, 1 not, 2 bad recipe or trace.
    """
    from ...engine.simulation.simulation import Stuck
    from ..capacity.plan import plan_recipe
    from ..recipe.file import load_recipe
    from ..recipe.recipe import RecipeError, contradictions
    from ..simulation.experts import ExpertLoadsError, balance_experts
    from ..simulation.trace import TraceError, read_trace

    try:
        parsed, path = load_recipe(recipe, overrides or (), contradictions)
        plan = plan_recipe(parsed, path.parent)
        asked = read_trace(trace, requests, speed, block)
        balances = parsed.experts.balance == "on"
        loads = None
        if experts is not None:
            loads = balance_experts(experts, plan.setup, balances=balances, folder=Path())
    except (RecipeError, TraceError, ExpertLoadsError) as error:
        raise refusal(error) from None
    if not plan.fits:
        raise refusal("\nerror: ".join(f"does not fit: {line}" for line in plan.misfits), 1)
    try:
        report = _run(plan, parsed, asked, efficiency, loads)
    except Stuck as error:
        raise refusal(error, 1) from None
    answer = None
    if as_json:
        options = {"speed": speed, "efficiency": efficiency, "block": block}
        answer = json.dumps({"recipe": path.name} | options | report.to_json(), indent=2)
    _print(report, answer, plan, path.stem, efficiency)
    raise typer.Exit(0 if report.complete else 1)


def _run(
    plan: CapacityPlan, recipe: Recipe, trace: Trace, efficiency: float, experts: ExpertBalance | None
) -> SimulationReport:
    """Simulates with a progress display until the end or the first Ctrl-C."""
    from ..simulation.screen import ProgressScreen
    from ..simulation.simulate import simulate_plan
    from ..terminal.interrupts import Interrupts

    interrupts = Interrupts()
    screen = ProgressScreen(messages())
    interrupts.install()

    def stop_after(progress: Progress) -> bool:
        screen.show(progress)
        return interrupts.count > 0

    try:
        return simulate_plan(plan, recipe, trace, efficiency, stop_after, experts)
    finally:
        screen.hide()  # else the terminal keeps its cursor hidden


def _print(
    report: SimulationReport, answer: str | None, plan: CapacityPlan, title: str, efficiency: float
) -> None:
    """Prints ``answer`` if there is one, else the report for people."""
    from ..simulation.screen import show_report

    try:
        if answer is not None:
            print(answer, flush=True)
        else:
            show_report(report, plan, title, efficiency, answers())
    except BrokenPipeError:  # the reader has gone and needs no message
        raise
    except OSError as error:
        raise refusal(f"cannot write the report: {error.strerror}", 1) from None
