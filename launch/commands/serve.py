"""``launch --recipe R [key=value ...]``: the default command, which serves."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from .app import DEFAULT, app
from .options import Overrides, RecipeName


@app.command(DEFAULT)
def launch(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Start the cluster that a recipe describes and serve until SIGTERM or Ctrl-C, then drain.

    Exit status: 0 stopped as asked, 1 failed, 2 bad recipe or usage.

    Other commands, each with --help: launch plan (memory, capacity and speed limits), launch
    check (problems on the nodes), launch simulate (a request trace), launch slurm (batch script),
    launch k8s (manifests), launch canary (answers that change), launch load (a trace against a
    server), launch bench (a server's speed), launch timeline (how steps pass).
    """
    from ..terminal.foreground import step_behind

    step_behind()
    _leave_at_once_after(lambda: sys.exit(_serve(recipe, overrides or ())))


def _serve(recipe: str, overrides: Sequence[str]) -> int:
    """Serves; returns the exit code. Signals are taken over before anything large is imported."""
    from ..terminal.interrupts import Interrupts

    interrupts = Interrupts()
    interrupts.install()
    try:
        from ..recipe.file import load_recipe
        from ..recipe.recipe import RecipeError
        from ..run.serve import serve
        from ..terminal.screen import Screen

        screen = Screen()
        parsed, path = load_recipe(recipe, overrides)
        return serve(parsed, path.parent, screen, interrupts)
    except KeyboardInterrupt:
        return 1
    except RecipeError as error:
        screen.error(str(error))
        return 2
    except ValueError as error:
        screen.error(str(error))
        return 1


def _leave_at_once_after(command: Callable[[], object]) -> NoReturn:
    """Runs ``command`` and ends the process without interpreter teardown.

    A closed run has nothing left to tear down. Unloading torch and Ray would take half a second,
    and Ray's own shutdown longer where its head has died.
    """
    code = 0
    try:
        command()
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else int(leave.code is not None)
        if isinstance(leave.code, str):  # a message: the interpreter would print it to stderr
            print(leave.code, file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # the reader is gone
            stream.flush()
    os._exit(code)
