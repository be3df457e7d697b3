"""``launch load``: replays a trace against a server and measures it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from ..defaults import BLOCK, EFFICIENCY, OPEN_REQUESTS
from .app import app
from .options import (
    Against,
    ApiKeyEnv,
    ArrivalSpeed,
    HashBlock,
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
    from ..capacity.plan import CapacityPlan
    from ..client.load import Load
    from ..client.server import Server
    from ..recipe.recipe import Recipe
    from ..simulation.report import SimulationReport
    from ..simulation.trace import Trace

_Trace = typer.Option(
    "--trace",
    "-t",
    help="Requests in the form that launch simulate reads: a file of JSON lines, or "
    "poisson:rate=20,input=2000,output=300,count=2000[,seed=0].",
)
_Json = typer.Option("--json", help="Print JSON: times in seconds.")
_Requests = typer.Option(min=1, help="Send only the first so many.")
_Open = typer.Option(
    "--max-open", min=1, max=100_000, help="Requests that may be open; others that are due leave later."
)
_Recipe = typer.Option("--recipe", "-r", help="Simulate the trace on this recipe too, and show both.")
_Efficiency = typer.Option(min=0.01, max=1.0, help="Same as for launch simulate.")


@app.command()
def load(
    against: Against,
    trace: Annotated[str, _Trace],
    overrides: Overrides = None,
    recipe: Annotated[str | None, _Recipe] = None,
    as_json: Annotated[bool, _Json] = False,
    speed: ArrivalSpeed = 1.0,
    requests: Annotated[int | None, _Requests] = None,
    block: HashBlock = BLOCK,
    max_open: Annotated[int, _Open] = OPEN_REQUESTS,
    efficiency: Annotated[float, _Efficiency] = EFFICIENCY,
    api_key_env: ApiKeyEnv = None,
    model: ModelName = None,
    timeout: Silence = 120.0,
) -> None:
    """Replay a request trace against a server and measure what clients see.

    Requests leave when they are due, whatever the server does. Prompts are random tokens that share
    prefixes as the trace says. Ctrl-C prints the results so far.

    Exit status: 0 every request answered, 1 some not, or stopped, 2 bad input or refused by the
    server, 3 server unreachable.
    """
    import asyncio

    from ..client.load_screen import show_load
    from ..client.server import ServerError
    from ..simulation.trace import TraceError, read_trace

    if recipe is None and overrides:
        raise refusal(f"{overrides[0]}: overrides a recipe; --recipe names none")
    try:
        asked = read_trace(trace, requests, speed, block)
    except TraceError as error:
        raise refusal(error) from None
    planned = None if recipe is None else fitting_plan(recipe, overrides or [])
    server = server_for(against, timeout, api_key_env)
    try:
        sent, complete = asyncio.run(_measure(server, asked, max_open, model))
    except ServerError as error:
        raise refusal(error, 2 if error.asked_wrongly else 3) from None
    report = sent.record.report(complete=complete)
    simulated = None
    if planned is not None and complete:
        simulated = _simulate(*planned, asked, efficiency)
    if as_json:
        beside = {} if simulated is None else {"simulated": simulated.to_json()}
        print(json.dumps({"measured": report.to_json()} | beside, indent=2), flush=True)
    else:
        show_load(report, simulated, sent.record.examples, answers())
    raise typer.Exit(0 if complete and not report.failed else 1)


async def _measure(server: Server, trace: Trace, max_open: int, wanted: str | None) -> tuple[Load, bool]:
    """Runs until all is answered or the first Ctrl-C or SIGTERM.

    Raises ServerError at the start only.
    """
    from ..client.load import Load, Target, vocabulary_size
    from ..client.load_screen import LoadProgress
    from ..client.server import served_model
    from ..terminal.stop_event import stop_event

    model = str((await served_model(server, wanted))["id"])
    target = Target(server, model, await vocabulary_size(server))
    made = Load(target, trace, max_open)
    screen = LoadProgress(messages())
    try:
        with stop_event() as stop:
            complete = await made.run(stop, screen.show)
    finally:
        screen.hide()
    return made, complete


def _simulate(plan: CapacityPlan, recipe: Recipe, trace: Trace, efficiency: float) -> SimulationReport | None:
    """The same trace on a simulated cluster, up to the first Ctrl-C; None, with a message, where it
    gets stuck.
    """
    from ...engine.simulation.simulation import Stuck
    from ..simulation.simulate import simulate_plan
    from ..terminal.interrupts import Interrupts

    interrupts = Interrupts()
    interrupts.install()
    messages().print("simulating the same trace")
    try:
        return simulate_plan(plan, recipe, trace, efficiency, lambda progress: interrupts.count > 0)
    except Stuck as error:
        messages().print(f"warning: not simulated: {error}", markup=False)
        return None
