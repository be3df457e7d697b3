"""The folders of a recipe's model."""

from __future__ import annotations

from pathlib import Path

from ...engine.models.description import description_file
from .recipe import Recipe


def model_directory(recipe: Recipe, folder: Path) -> Path:
    """The folder of the served model: the checkpoint's, or with random weights the description's.
    ``folder`` is the recipe file's.
    """
    is_random = recipe.model.weights == "random"
    return description_folder(recipe, folder) if is_random else _path(recipe, folder)


def description_folder(recipe: Recipe, folder: Path) -> Path:
    """The folder of the description: the model's, or ``model.config`` if that is missing."""
    path = _path(recipe, folder)
    if recipe.model.config is None or description_file(path).is_file():
        return path
    return (folder / Path(recipe.model.config).expanduser()).resolve()


def _path(recipe: Recipe, folder: Path) -> Path:
    return (folder / Path(recipe.model.path).expanduser()).resolve()
