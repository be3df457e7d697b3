"""Options that several commands share, and their errors for an unusable recipe."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from ..defaults import CONTEXT

if TYPE_CHECKING:
    from rich.console import Console

    from ..capacity.plan import CapacityPlan
    from ..client.server import Server
    from ..recipe.recipe import Recipe

RecipeName = Annotated[
    str, typer.Option("--recipe", "-r", help="Recipe file, or name of a packaged recipe such as demo.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Override recipe keys, e.g. frontend.port=9000."),
]

Against = Annotated[
    str, typer.Option("--against", metavar="URL", help="Server, such as http://127.0.0.1:8000.")
]
ApiKeyEnv = Annotated[
    str | None, typer.Option(metavar="NAME", help="Environment variable with the server's API key.")
]
ModelName = Annotated[str | None, typer.Option("--model", help="Model to ask. Default: the first listed.")]
Silence = Annotated[
    float,
    typer.Option(
        "--timeout",
        min=0.01,
        max=86400,
        help="Seconds without a byte from the server before it counts as lost.",
    ),
]

# Options of commands that read a trace.
ArrivalSpeed = Annotated[
    float, typer.Option("--speed", min=1e-6, max=1e6, help="Factor by which requests arrive faster.")
]
HashBlock = Annotated[int, typer.Option("--block", min=1, max=1 << 20, help="Tokens per block of hash_ids.")]


def answers() -> Console:
    """Standard output."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True)


def messages() -> Console:
    """Standard error."""
    from rich.console import Console

    return Console(file=sys.stderr, highlight=False, soft_wrap=True)


def refusal(error: object, code: int = 2) -> typer.Exit:
    """Prints an error; returns the exit to raise."""
    messages().print(f"error: {error}", markup=False)
    return typer.Exit(code)


def server_for(
    url: str, timeout: float, key_env: str | None, options: tuple[str, str] | None = None
) -> Server:
    """The server that the options name; exits with 2 if they name none. ``options``: names of
    those for the URL and the key's variable, where they are not those of most commands.
    """
    from ..client.server import URL_AND_KEY, AddressError, server_at
    from ..environment import variable

    key, options = None, options or URL_AND_KEY
    if key_env is not None and not (key := variable(key_env)):
        raise refusal(f"{options[1]} {key_env}: not set; should name an environment variable with the key")
    try:
        return server_at(url, timeout, key, options)
    except AddressError as error:
        raise refusal(error) from None


def fitting_plan(name: str, overrides: list[str], context: int = CONTEXT) -> tuple[CapacityPlan, Recipe]:
    """The plan of a recipe given by ``--recipe``; exits with 2 if it cannot be used or does not
    fit.
    """
    from ..capacity.plan import plan_recipe
    from ..recipe.file import load_recipe
    from ..recipe.recipe import RecipeError, contradictions

    try:
        parsed, path = load_recipe(name, overrides, contradictions)
        plan = plan_recipe(parsed, path.parent, context)
    except RecipeError as error:
        raise refusal(error) from None
    if not plan.fits:
        raise refusal("\nerror: ".join(f"--recipe {name} does not fit: {line}" for line in plan.misfits))
    return plan, parsed
