"""Options that several commands share, and their answer to a recipe that cannot be used."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

RecipeName = Annotated[
    str, typer.Option("--recipe", "-r", help="Recipe file, or name of a packaged recipe such as demo.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Override recipe keys, e.g. frontend.port=9000."),
]


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
