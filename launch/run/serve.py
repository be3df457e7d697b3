"""One run of a cluster from its recipe: checks, start, watch, drain, close."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from ...engine.models.config import load_config
from ..cluster.cluster import LaunchError
from ..preflight.check import preflight, refuse_errors
from ..recipe.model_folder import model_directory
from ..recipe.placement import placement_of_recipe
from ..recipe.recipe import Recipe, RecipeError
from ..recipe.resolve import check_model
from ..terminal.interrupts import Interrupted, Interrupts
from ..terminal.screen import Screen
from .last_resort import LastResort
from .run_folder import RunFolder
from .start import Run, start
from .supervisor import CLOSE_SECONDS


def serve(recipe: Recipe, folder: Path, screen: Screen, interrupts: Interrupts) -> int:
    """Serves ``recipe``, whose file is in ``folder``, until told to stop; returns the exit code.

    Raises RecipeError when the recipe does not fit its model, ValueError when the model cannot be
    served here.
    """
    path = model_directory(recipe, folder)
    try:
        config = load_config(path)
    except ValueError as error:
        raise ValueError(f"model.path: {error}") from None
    if found := check_model(recipe, config):
        raise RecipeError("the recipe does not fit the model\n" + "\n".join(f"  {line}" for line in found))
    placement = placement_of_recipe(recipe, config, folder)
    for warning in refuse_errors(preflight(recipe, folder)):
        screen.say(f"warning: {warning}")
    logs = RunFolder(recipe.cluster.log_dir)
    code, opened = 1, ExitStack()
    try:
        supervisor = start(Run(recipe, config, path, logs.path, screen, interrupts, placement), opened)
        supervisor.watch()
        code = supervisor.drain()
    except LaunchError as error:
        screen.error(str(error))
    except Interrupted as error:
        screen.error(f"{error} before the cluster was ready")
    except KeyboardInterrupt:
        screen.error("stopped at once; running requests were cut off")
    finally:
        interrupts.muted = True
        screen.hide()
        with LastResort(CLOSE_SECONDS, "closing"):
            opened.close()
        kept = logs.end(failed=code != 0)
        screen.say(f"stopped; logs: {logs.path}" if kept else "stopped")
    return code
