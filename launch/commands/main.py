"""The commands: ``launch --recipe R [key=value ...]`` and those with a name of their own.

Exit status: 0 as asked, 1 a failure, 2 a bad recipe or usage.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from typing import Annotated, NoReturn

import typer

from ..recipe.file import load_recipe
from ..recipe.recipe import RecipeError
from ..run.supervisor import serve
from ..terminal.foreground import step_behind
from ..terminal.interrupts import Interrupts
from ..terminal.screen import Screen
from .check import check
from .plan import plan
from .simulate import simulate_app
from .slurm import slurm_app

_HELP = {"help_option_names": ["-h", "--help"]}

app = typer.Typer(
    add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, context_settings=_HELP
)
plan_app = typer.Typer(
    add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, context_settings=_HELP
)
plan_app.command()(plan)
check_app = typer.Typer(
    add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, context_settings=_HELP
)
check_app.command()(check)


@app.command()
def launch(
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", help="A recipe file, or the name of a packaged recipe (demo).")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Override keys of the recipe.")
    ] = None,
) -> None:
    """Starts the cluster that a recipe describes and serves until SIGTERM or Ctrl-C, then drains.

    See also launch plan, launch simulate, launch check and launch slurm, each with --help.
    """
    screen, interrupts = Screen(), Interrupts()
    interrupts.install()
    try:
        parsed, path = load_recipe(recipe, overrides or ())
        code = serve(parsed, path.parent, screen, interrupts)
    except RecipeError as error:
        screen.error(str(error))
        code = 2
    except ValueError as error:
        screen.error(str(error))
        code = 1
    except KeyboardInterrupt:
        code = 1
    raise typer.Exit(code)


def run() -> None:
    """The command that was asked for. ``plan``, ``simulate``, ``check`` and ``slurm`` have options
    of their own and serve nothing.
    """
    if sys.argv[1:2] == ["plan"]:
        plan_app(sys.argv[2:], prog_name="launch plan")
    if sys.argv[1:2] == ["check"]:
        check_app(sys.argv[2:], prog_name="launch check")
    if sys.argv[1:2] == ["simulate"]:
        simulate_app(sys.argv[2:], prog_name="launch simulate")
    if sys.argv[1:2] == ["slurm"]:
        slurm_app(sys.argv[2:], prog_name="launch slurm")
    step_behind()
    _leave_at_once_after(lambda: app(prog_name="launch"))


def _leave_at_once_after(command: Callable[[], object]) -> NoReturn:
    """Nothing is left to be torn down once a run is closed; to unload torch and Ray would take half
    a second, and Ray's own last steps longer where its head has died.
    """
    code = 0
    try:
        command()
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else int(leave.code is not None)
        if isinstance(leave.code, str):  # a message, as the interpreter takes it
            print(leave.code, file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # nobody reads it any more
            stream.flush()
    os._exit(code)
