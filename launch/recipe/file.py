"""Reads a recipe: YAML, overrides, and errors that name the key, the value and what is allowed."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from .keys import key_paths, key_type
from .recipe import Recipe, RecipeError, problems


class _Loader(yaml.SafeLoader):
    """YAML loader that refuses duplicate keys, which YAML itself accepts silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(key_node.value)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


Check = Callable[[Recipe], list[str]]
# For the hint where one stands in the wrong place.
COMMANDS = ("plan", "check", "slurm", "simulate", "k8s", "canary", "load", "bench", "timeline")


def load_recipe(name: str, overrides: Sequence[str] = (), check: Check = problems) -> tuple[Recipe, Path]:
    """Reads the recipe ``name`` (a path, or a packaged recipe's name with or without .yaml).

    Returns the recipe and the file. Raises RecipeError with all problems; ``check`` finds those of
    a well-formed recipe.
    """
    path = find_recipe(name)
    try:
        text = path.read_bytes()
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    return parse_recipe(text, [from_here(override) for override in overrides], str(path), check), path


def from_here(override: str) -> str:
    """Makes model.path in an override absolute: on the command line it is relative to the current
    folder, not to the recipe's.
    """
    key, equals, value = override.partition("=")
    return (
        f"{key}={Path(value.strip()).expanduser().absolute()}"
        if equals and key.strip() == "model.path" and value.strip()
        else override
    )


def find_recipe(name: str) -> Path:
    """The file of a recipe; an existing path takes precedence over a packaged name."""
    path = Path(name).expanduser()
    if path.is_file():
        return path.resolve()
    folder = Path(str(resources.files(__package__.partition(".")[0] + ".recipes")))
    packaged = sorted(entry.name for entry in folder.glob("*.yaml"))
    for candidate in (name, f"{name}.yaml"):
        if candidate in packaged:
            return folder / candidate
    problem = "is a directory" if name and path.is_dir() else "no such file"
    stems = [entry.removesuffix(".yaml") for entry in packaged]
    close = difflib.get_close_matches(path.stem, stems, n=1, cutoff=0.7)
    hint = f"; did you mean {close[0]}.yaml?" if close else ""
    known = ", ".join(packaged) or "none"
    raise RecipeError(f"--recipe {name}: {problem}, and not a packaged recipe{hint} (packaged: {known})")


def parse_recipe(
    text: bytes | str, overrides: Sequence[str] = (), source: str = "recipe", check: Check = problems
) -> Recipe:
    """The recipe in ``text`` with ``key=value`` overrides applied. Raises RecipeError."""
    data = _parse_yaml(text, source)
    wrong = []
    for override in overrides:
        try:
            _override(data, override)
        except RecipeError as error:
            wrong.append(str(error))
    if wrong:
        several = [f"{len(wrong)} overrides cannot be used", *wrong]
        raise RecipeError(wrong[0] if len(wrong) == 1 else "\n  ".join(several))
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise _refusal(source, [_explain(detail) for detail in error.errors()]) from None
    if found := check(recipe):
        raise _refusal(source, found)
    return recipe


def _refusal(source: str, lines: list[str]) -> RecipeError:
    count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
    return RecipeError(f"{source}: {count}\n" + "\n".join(f"  {line}" for line in lines))


def _parse_yaml(text: bytes | str, source: str) -> dict[str, Any]:
    try:
        data = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise RecipeError(f"{source}:{where}: not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        raise RecipeError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise RecipeError(f"{source}: not valid YAML: nested too deeply") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        kind = type(data).__name__
        raise RecipeError(f"{source}: expected sections with keys (model:, cluster:, ...), got a {kind}")
    return data


def _override(data: dict[str, Any], text: str) -> None:
    """Sets one key in place. The value is YAML, or plain text for a key of type text."""
    key, equals, raw = text.partition("=")
    key = key.strip()
    if not equals or not key:
        commands = difflib.get_close_matches(text, COMMANDS, n=1)
        hint = f"; did you mean launch {commands[0]}?" if commands else ""
        raise RecipeError(f"override {text!r}: should be key=value, for example frontend.port=9000{hint}")
    path = tuple(key.split("."))
    kind = key_type(path)
    if kind is None:
        raise RecipeError(f"override {text!r}: {key}: unknown key{_nearest(key, key_paths())}")
    part: Any = data
    for name in path[:-1]:
        if part.get(name) is None:
            part[name] = {}
        part = part[name]
        if not isinstance(part, dict):
            raise RecipeError(f"override {text!r}: {name} is not a section in the recipe but {_show(part)}")
    part[path[-1]] = _override_value(kind, raw.strip(), text)


def _override_value(kind: Any, raw: str, text: str) -> object:
    takes_text = kind is str or str in get_args(kind)
    if takes_text and tuple not in (kind, getattr(kind, "__origin__", None)):
        return None if raw in ("null", "~") and type(None) in get_args(kind) else raw
    try:
        return yaml.load(raw, _Loader)
    except yaml.YAMLError:
        raise RecipeError(f"override {text!r}: the value {raw!r} is not valid YAML") from None


def _explain(detail: ErrorDetails) -> str:
    """One line for a pydantic error: key, value, what is allowed or the nearest key."""
    path = ".".join(str(part) for part in detail["loc"]) or "recipe"
    value = detail.get("input")
    if detail["type"] == "extra_forbidden":
        return f"{path} = {_show(value)}: unknown key{_nearest(path, key_paths())}"
    if detail["type"] == "missing":
        return f"{path}: missing, and it has no default"
    if detail["type"] in ("model_type", "model_attributes_type"):
        keys = [key.rpartition(".")[2] for key in key_paths() if key.rpartition(".")[0] == path]
        return f"{path} = {_show(value)}: should be a section with keys ({', '.join(keys)})"
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Input ")
    message = message.replace("valid tuple", "list")
    return f"{path} = {_show(value)}: {message[0].lower()}{message[1:]}"


def _show(value: object) -> str:
    as_json = isinstance(value, str | list | dict | bool | None)
    text = json.dumps(value, default=str) if as_json else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _nearest(key: str, known: Sequence[str]) -> str:
    """A hint at the most similar key: by its whole path, else by its last name in any section."""
    found = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    if not found:
        last = key.rpartition(".")[2]
        names = {path.rpartition(".")[2]: path for path in reversed(known)}
        found = [names[name] for name in difflib.get_close_matches(last, names, n=1, cutoff=0.7)]
    return f"; did you mean {found[0]}?" if found else ""
