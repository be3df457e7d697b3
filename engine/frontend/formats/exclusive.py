"""``oneOf`` as ``anyOf``, where its members exclude one another: by their types, their values, or a
property that tells objects apart, as in the discriminated unions of clients' libraries.

Where objects need not have that property, it is required of them: what is then written follows the
schema, though the schema would allow more.
"""

from __future__ import annotations

from typing import Any

import msgspec

Schema = dict[str, Any]
_TYPES = ("string", "number", "boolean", "null", "array", "object")
_TYPE_OF = {b'"': "string", b"t": "boolean", b"f": "boolean", b"n": "null"}
_MAX_REFS = 16  # longest chain of references


def exclusive(members: list[Any], discriminator: Any, root: Any) -> list[Any] | None:
    """Members of an ``anyOf`` that holds the ``oneOf`` of ``members``, None where they may overlap.
    ``discriminator`` is that of OpenAPI, if there is one; references lead into ``root``. The cost
    grows with the size of the members, not with the number of their pairs.
    """
    schemas = [_resolved(member, root) for member in members]
    if not all(isinstance(schema, dict) for schema in schemas):
        return None
    by_type: dict[str, list[int]] = {name: [] for name in _TYPES}
    for index, schema in enumerate(schemas):
        for name in _types(schema):
            by_type.setdefault(name, []).append(index)
    objects = by_type.pop("object")
    if not all(_apart([_values(schemas[index]) for index in same]) for same in by_type.values()):
        return None
    if len(objects) < 2:
        return members
    named = discriminator.get("propertyName") if isinstance(discriminator, dict) else None
    for name in [named] if isinstance(named, str) else _properties(schemas[objects[0]]):
        if _apart([_tag(schemas[index], name, root) for index in objects]):
            tagged = set(objects)
            return [
                _requiring(member, schemas[index], name) if index in tagged else member
                for index, member in enumerate(members)
            ]
    return None


def _resolved(member: Any, root: Any) -> Any:
    """The schema that ``member`` refers to; None where that is not known."""
    for _ in range(_MAX_REFS):
        if not isinstance(member, dict) or "$ref" not in member:
            return member
        found = _at(root, member["$ref"])
        if found is None:
            return None
        member = found
    return None


def _at(root: Any, pointer: Any) -> Any:
    if not isinstance(pointer, str) or not pointer.startswith("#"):
        return None
    for part in pointer[1:].split("/")[1:]:
        root = root.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(root, dict) else None
    return root


def _types(schema: Schema) -> set[str]:
    """Types of the values that ``schema`` may allow."""
    values = _values(schema)
    if values is not None:
        return {_TYPE_OF[value[:1]] for value in values}
    named = schema.get("type", list(_TYPES))
    names = named if isinstance(named, list) else [named]
    return {"number" if name == "integer" else name for name in names if isinstance(name, str)}


def _apart(sets: list[frozenset[bytes] | None]) -> bool:
    """Whether no value can be in two of ``sets``; None is a set that is not known."""
    if len(sets) < 2:
        return True
    seen: set[bytes] = set()
    for values in sets:
        if values is None or values & seen:
            return False
        seen |= values
    return True


def _values(schema: Any) -> frozenset[bytes] | None:
    """The values that ``schema`` names, as JSON; None where it names none. Numbers that are equal
    may be written in several ways, so they count as unknown.
    """
    if not isinstance(schema, dict):
        return None
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if not isinstance(values, list) or not all(isinstance(value, str | bool | None) for value in values):
        return None
    return frozenset(map(msgspec.json.encode, values))


def _properties(schema: Schema) -> list[str]:
    found = schema.get("properties")
    return list(found) if isinstance(found, dict) and schema.get("type") == "object" else []


def _tag(schema: Schema, name: str, root: Any) -> frozenset[bytes] | None:
    """The values of the property ``name`` of an object."""
    return _values(_resolved(schema["properties"][name], root)) if name in _properties(schema) else None


def _requiring(member: Schema, resolved: Schema, name: str) -> Schema:
    if name in resolved.get("required", ()):
        return member
    return {"allOf": [member, {"required": [name]}]}
