"""Finds the place at which a JSON schema is malformed, before anything is made of it."""

from __future__ import annotations

from typing import Any

from ..api.errors import shown
from ..formats.parameters import KINDS, Parameters

_TYPES = KINDS | {"integer"}
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_SCHEMAS = ("additionalProperties", "propertyNames", "not", "contains", "if", "then", "else")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_TEXTS = ("pattern", "$ref", "format")
_COUNTS = ("minLength", "maxLength", "minProperties", "maxProperties", "minItems", "maxItems")


def check_parameters(schema: Any, where: str) -> None:
    """Raises ValueError, naming a place from ``where`` on, unless ``schema`` is a well-formed
    schema of an object.
    """
    if not isinstance(schema, dict):
        raise ValueError(f"{where} should be an object (got {shown(schema)})")
    root = Parameters(schema)
    waiting: list[tuple[Any, str]] = [(schema, where)]
    sound: set[int] = set()
    for part, place in waiting:
        if isinstance(part, bool):
            continue
        if not isinstance(part, dict):
            raise ValueError(f"{place} should be a schema: an object or a truth value (got {shown(part)})")
        _check_values(part, place)
        _check_reference(root, part, place, sound)
        waiting += _parts(part, place)
    if "object" not in Parameters({**schema, "$ref": None}).kinds({"type": schema.get("type")}):
        raise ValueError(f"{where}.type should be 'object' (got {shown(schema['type'])})")


def _parts(part: dict[str, Any], place: str) -> list[tuple[Any, str]]:
    """The schemas inside ``part`` with their places."""
    found: list[tuple[Any, str]] = []
    for key in _MAPS:
        if key in part:
            members = part[key]
            if not isinstance(members, dict):
                raise ValueError(f"{place}.{key} should be an object (got {shown(members)})")
            found += [(value, f"{place}.{key}.{name}") for name, value in members.items()]
    found += [(part[key], f"{place}.{key}") for key in _SCHEMAS if key in part]
    for key in _LISTS:
        if key in part:
            if not isinstance(part[key], list) or not part[key]:
                raise ValueError(f"{place}.{key} should be a list of schemas (got {shown(part[key])})")
            found += [(value, f"{place}.{key}[{index}]") for index, value in enumerate(part[key])]
    items = part.get("items", True)
    many = enumerate(items) if isinstance(items, list) else [(None, items)]
    found += [(value, f"{place}.items{'' if index is None else f'[{index}]'}") for index, value in many]
    return found


def _check_values(part: dict[str, Any], place: str) -> None:
    if "type" in part:
        types = part["type"] if isinstance(part["type"], list) else [part["type"]]
        if not types or not all(isinstance(name, str) and name in _TYPES for name in types):
            raise ValueError(
                f"{place}.type: Invalid type: {_word(part['type'])}; known are {', '.join(sorted(_TYPES))}"
            )
    if "enum" in part and not (isinstance(part["enum"], list) and part["enum"]):
        raise ValueError(f"{place}.enum should be a list of values (got {shown(part['enum'])})")
    required = part.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise ValueError(f"{place}.required should be a list of names (got {shown(required)})")
    for key in _TEXTS:
        if key in part and not isinstance(part[key], str):
            raise ValueError(f"{place}.{key} should be a string (got {shown(part[key])})")
    for key in _COUNTS:
        count = part.get(key, 0)
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            raise ValueError(f"{place}.{key} should be a whole number from 0 (got {shown(count)})")


def _word(given: Any) -> str:
    return given if isinstance(given, str) else shown(given)


def _check_reference(root: Parameters, part: dict[str, Any], place: str, sound: set[int]) -> None:
    """Raises ValueError if the references from ``part`` lead round in a circle. ``sound`` are the
    parts from which they do not.
    """
    seen: set[int] = set()
    at: Any = part
    while isinstance(at, dict) and "$ref" in at and id(at) not in sound:
        if id(at) in seen:
            raise ValueError(f"{place}.$ref refers to itself")
        seen.add(id(at))
        at = root.resolve(at)
    sound |= seen
