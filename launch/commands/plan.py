"""``launch plan``: what a recipe needs and what it can do, without starting anything. Exit status:
0 fits, 1 not, 2 a bad recipe.
"""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer
from rich.console import Console

from ..capacity.plan import CONTEXT, plan_recipe
from ..capacity.screen import show_plan
from ..recipe.file import load_recipe
from ..recipe.recipe import RecipeError, contradictions


def plan(
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", help="A recipe file, or the name of a packaged recipe.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Override keys of the recipe.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the plan for a program; sizes in bytes, times in seconds.")
    ] = False,
    context: Annotated[
        int, typer.Option(min=1, help="Tokens of a request that batch and floors are computed for.")
    ] = CONTEXT,
) -> None:
    """Shows memory, capacity and floors of time of a recipe, and why it would not fit."""
    try:
        parsed, path = load_recipe(recipe, overrides or (), contradictions)
        made = plan_recipe(parsed, path.parent, context)
    except RecipeError as error:
        Console(file=sys.stderr, highlight=False, soft_wrap=True).print(f"error: {error}", markup=False)
        raise typer.Exit(2) from None
    if as_json:
        print(json.dumps({"recipe": path.name} | made.to_json(), indent=2))
    else:
        show_plan(made, path.stem, Console(highlight=False, soft_wrap=True))
    raise typer.Exit(0 if made.fits else 1)
