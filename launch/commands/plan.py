"""``launch plan``: a recipe's memory, capacity and limits. Starts nothing."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from ..defaults import CONTEXT
from .app import app
from .options import Overrides, RecipeName, answers, refusal


@app.command()
def plan(
    recipe: RecipeName,
    overrides: Overrides = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON: sizes in bytes, times in seconds.")
    ] = False,
    context: Annotated[
        int, typer.Option(min=1, help="Tokens per request, for the batch size and the floors.")
    ] = CONTEXT,
) -> None:
    """Show a recipe's memory, capacity and time floors, and why it would not fit.

    Exit status: 0 fits, 1 does not fit, 2 bad recipe.
    """
    from ..capacity.plan import plan_recipe
    from ..capacity.screen import show_plan
    from ..recipe.file import load_recipe
    from ..recipe.recipe import RecipeError, contradictions

    try:
        parsed, path = load_recipe(recipe, overrides or (), contradictions)
        made = plan_recipe(parsed, path.parent, context)
    except RecipeError as error:
        raise refusal(error) from None
    if as_json:
        print(json.dumps({"recipe": path.name} | made.to_json(), indent=2))
    else:
        show_plan(made, path.stem, answers())
    raise typer.Exit(0 if made.fits else 1)
