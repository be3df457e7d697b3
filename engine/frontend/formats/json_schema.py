"""JSON schemas as grammars can follow them.

A keyword is followed, says nothing about the text (it is left out, with all that a validator may
ignore), or cannot be held while a text is written from left to right: then the schema is refused,
by the keyword's path. Specification: JSON Schema 2020-12 and the drafts before it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .exclusive import exclusive

FORMATS = frozenset(
    ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid")
)
"""Formats that the grammar library follows. By the specification any other is no constraint."""

DRAFTS = (
    "http://json-schema.org/draft-04/schema",
    "http://json-schema.org/draft-06/schema",
    "http://json-schema.org/draft-07/schema",
    "https://json-schema.org/draft/2019-09/schema",
    "https://json-schema.org/draft/2020-12/schema",
)
VALUES = frozenset(("const", "enum", "default", "examples", "example"))
"""Keywords that hold values, in which nothing is a keyword."""

OBJECTS = frozenset(("properties", "patternProperties", "$defs", "definitions"))
SINGLE = frozenset(("items", "additionalProperties", "additionalItems"))
DEPENDENT = frozenset(("dependentRequired", "dependentSchemas", "dependencies"))
LISTS = frozenset(("allOf", "anyOf", "oneOf", "prefixItems"))
WHOLE = frozenset(("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"))
IN_PLACE = ("$ref", "allOf", "anyOf", "oneOf")
DROPPED = frozenset(("$dynamicAnchor", "$recursiveAnchor", "minContains", "maxContains", "then", "else"))
Schema = dict[str, Any]


class SchemaFault(ValueError):
    """A schema that cannot be followed; the message names the path of the keyword."""


def followed(schema: Any) -> Any:
    """``schema`` with the keywords that a grammar follows. Raises SchemaFault."""
    return _followed(schema, "", schema)


def _followed(schema: Any, path: str, root: Any) -> Any:
    if not isinstance(schema, dict):
        return schema
    _check_shapes(schema, path)
    kept: Schema = {}
    for key, value in schema.items():
        here = f"{path}.{key}" if path else key
        if key in VALUES:
            kept[key] = value
        elif key in OBJECTS:
            kept[key] = {name: _followed(part, f"{here}.{name}", root) for name, part in value.items()}
        elif key in LISTS or (key == "items" and isinstance(value, list)):
            kept[key] = [_followed(part, f"{here}[{number}]", root) for number, part in enumerate(value)]
        elif key in WHOLE and isinstance(value, float) and value.is_integer():
            kept[key] = int(value)
        elif key in _HELD_IF:
            if not _HELD_IF[key](schema):
                raise SchemaFault(f"{here} cannot be held while a text is written; leave it out")
        elif key in SINGLE:
            kept[key] = _followed(value, here, root)
        elif key not in DROPPED and not (key in _IGNORED_IF and _IGNORED_IF[key](value)):
            kept[key] = _maybe_followed(value, here, root)
    return _exclusive(schema, _closed(schema, kept, path, root), root)


def _exclusive(schema: Schema, kept: Schema, root: Any) -> Schema:
    """Takes ``oneOf`` for ``anyOf`` where that is the same."""
    if "oneOf" in kept and "anyOf" not in kept:
        members = exclusive(kept["oneOf"], schema.get("discriminator"), root)
        if members is not None:
            del kept["oneOf"]
            kept["anyOf"] = members
    return kept


def _maybe_followed(value: Any, path: str, root: Any) -> Any:
    """The value of a keyword that nobody knows: a $ref may lead to schemas in it."""
    try:
        return _followed(value, path, root)
    except SchemaFault:
        return value


def _check_shapes(schema: Schema, path: str) -> None:
    """Refuses what is no schema and what no format of tool calls could read."""
    for key, kind, allowed in (
        *((key, dict, "an object") for key in sorted(OBJECTS | DEPENDENT)),
        *((key, list, "a list") for key in (*sorted(LISTS), "enum", "required")),
    ):
        if key in schema and not isinstance(schema[key], kind):
            raise SchemaFault(f"{path}.{key} should be {allowed}".lstrip("."))
    if not all(isinstance(name, str) for name in schema.get("required", ())):
        raise SchemaFault(f"{path}.required should be a list of names".lstrip("."))


def _closed(schema: Schema, kept: Schema, path: str, root: Any) -> Schema:
    """Takes unevaluated members for additional ones, which they are where no other schema applies
    to the same object or array.
    """
    for key, evaluated in (("unevaluatedProperties", "additionalProperties"), ("unevaluatedItems", "items")):
        if key in schema and not _says_nothing(schema[key]):
            here = f"{path}.{key}".lstrip(".")
            if any(name in schema for name in (*IN_PLACE, "if", "dependentSchemas")):
                raise SchemaFault(f"{here} cannot be held beside {', '.join(IN_PLACE)}")
            kept.setdefault(evaluated, _followed(schema[key], here, root))
    return kept


def _says_nothing(value: Any) -> bool:
    """Whether a subschema allows everything."""
    return value is True or value == {}


_HELD_IF: dict[str, Callable[[Schema], bool]] = {
    "not": lambda schema: schema["not"] is False,
    "if": lambda schema: all(_says_nothing(schema.get(key, True)) for key in ("then", "else")),
    "uniqueItems": lambda schema: schema["uniqueItems"] is False or schema.get("maxItems", 2) in (0, 1),
    "contains": lambda schema: schema.get("minContains", 1) == 0 and "maxContains" not in schema,
    "propertyNames": lambda schema: _says_nothing(schema["propertyNames"]),
    "dependentRequired": lambda schema: not any(schema["dependentRequired"].values()),
    "dependentSchemas": lambda schema: all(map(_says_nothing, schema["dependentSchemas"].values())),
    "dependencies": lambda schema: (
        not any(part for part in schema["dependencies"].values() if not _says_nothing(part))
    ),
    "$dynamicRef": lambda schema: False,
    "$recursiveRef": lambda schema: False,
    # Replaced by ``_closed``.
    "unevaluatedProperties": lambda schema: True,
    "unevaluatedItems": lambda schema: True,
}
"""Keywords that are left out where they say nothing, and refused where they do."""

_IGNORED_IF: dict[str, Callable[[Any], bool]] = {
    "format": lambda value: not isinstance(value, str) or value not in FORMATS,
    "$schema": lambda value: not isinstance(value, str) or value.rstrip("#") not in DRAFTS,
}
