"""``launch check``: looks for problems on every node that a recipe would use."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from .app import app
from .options import Overrides, RecipeName, answers, refusal

if TYPE_CHECKING:
    from rich.console import Console

    from ..preflight.finding import Finding

_STYLE = {"ok": "green", "warning": "yellow", "error": "bold red"}


@app.command()
def check(
    recipe: RecipeName,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Check every node that a recipe would use.

    Exit status: 0 no problems, 1 errors, 2 bad recipe, 3 warnings only.
    """
    from ..preflight.check import check as check_recipe
    from ..preflight.finding import exit_status, to_json
    from ..recipe.file import load_recipe
    from ..recipe.recipe import RecipeError, contradictions

    try:
        parsed, path = load_recipe(recipe, overrides or (), contradictions)
    except RecipeError as error:
        raise refusal(error) from None
    found = check_recipe(parsed, path.parent)
    if as_json:
        print(json.dumps({"recipe": path.name} | to_json(found), indent=2))
    else:
        show(found, answers())
    raise typer.Exit(exit_status(found))


def show(found: list[Finding], console: Console) -> None:
    """Prints one line per finding, then their number."""
    from rich.markup import escape

    for finding in found:
        console.print(f"[{_STYLE[finding.level]}]{finding.level:<8}[/]{escape(str(finding))}")
    counts = [(level, sum(finding.level == level for finding in found)) for level in ("error", "warning")]
    total = ", ".join(f"{count} {level}{'s' if count > 1 else ''}" for level, count in counts if count)
    console.print(total or "no problems found")
