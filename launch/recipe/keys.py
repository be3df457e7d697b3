"""The keys of a recipe, by their paths."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from .recipe import Recipe


def key_type(path: tuple[str, ...]) -> Any:
    """The annotation of a key; None for a section or an unknown key."""
    part: type[BaseModel] = Recipe
    for name in path[:-1]:
        field = part.model_fields.get(name)
        if field is None or not (
            isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        ):
            return None
        part = field.annotation
    field = part.model_fields.get(path[-1])
    return None if field is None else field.annotation


def key_paths(part: type[BaseModel] = Recipe, prefix: str = "") -> list[str]:
    """Every key of the recipe as a dotted path, sections included."""
    paths = []
    for name, field in part.model_fields.items():
        paths.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            paths += key_paths(field.annotation, f"{prefix}{name}.")
    return paths
