"""``launch check``: looks for what stands in the way, on every node. Exit status: 0 nothing, 1
errors, 2 a bad recipe, 3 only warnings.
"""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from ..preflight.check import check as check_recipe
from ..preflight.finding import Finding, exit_status, to_json
from ..recipe.file import load_recipe
from ..recipe.recipe import RecipeError, contradictions

_STYLE = {"ok": "green", "warning": "yellow", "error": "bold red"}


def check(
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", help="A recipe file, or the name of a packaged recipe.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Override keys of the recipe.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings for a program.")] = False,
) -> None:
    """Looks at every node that a recipe would use. Exit status: 0 nothing found, 1 errors, 2 a bad
    recipe, 3 only warnings.
    """
    try:
        parsed, path = load_recipe(recipe, overrides or (), contradictions)
    except RecipeError as error:
        Console(file=sys.stderr, highlight=False, soft_wrap=True).print(f"error: {error}", markup=False)
        raise typer.Exit(2) from None
    found = check_recipe(parsed, path.parent)
    if as_json:
        print(json.dumps({"recipe": path.name} | to_json(found), indent=2))
    else:
        show(found, Console(highlight=False, soft_wrap=True))
    raise typer.Exit(exit_status(found))


def show(found: list[Finding], console: Console) -> None:
    """A line for each, then what it comes to."""
    for finding in found:
        console.print(f"[{_STYLE[finding.level]}]{finding.level:<8}[/]{escape(str(finding))}")
    counts = [(level, sum(finding.level == level for finding in found)) for level in ("error", "warning")]
    console.print(
        ", ".join(f"{count} {level}{'s' if count > 1 else ''}" for level, count in counts if count)
        or "nothing in the way"
    )
