"""A function's parameters as JSON schema: the kinds of value that each of them may have.

Schemas come from clients. Here nothing is refused: a part that makes no sense allows everything.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from .json_text import decoded_or_none

KINDS = frozenset({"string", "number", "boolean", "null", "array", "object"})
TEXT = frozenset({"string"})
_STRING_KEYWORDS = frozenset({"pattern", "minLength", "maxLength", "format"})
UNIONS = ("anyOf", "oneOf")
_MAX_DEPTH = 64


class Parameters:
    """The schema ``root`` of a function's arguments, which may be anything."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._parts: dict[str, Any] = {}
        self._kinds: dict[int, frozenset[str]] = {}  # by the id of a part, which root or _parts keeps

    def part(self, key: str) -> Any:
        """The schema of the argument ``key``."""
        if key not in self._parts:
            found: list[Any] = []
            others: list[Any] = []
            for schema in self._layers(self._root):
                properties = schema.get("properties")
                if isinstance(properties, dict) and key in properties:
                    found.append(properties[key])
                patterns = schema.get("patternProperties")
                others += patterns.values() if isinstance(patterns, dict) else ()
                others += [schema["additionalProperties"]] if schema.get("additionalProperties") else ()
            found = found or others
            self._parts[key] = found[0] if len(found) == 1 else {"anyOf": found} if found else {}
        return self._parts[key]

    def kinds(self, part: Any) -> frozenset[str]:
        """The kinds of value that a part of the schema allows, as JSON schema names them; a number
        is one whether whole or not.
        """
        return self._kinds_of(part, 0)

    def takes_json(self, part: Any, json: str, raw: str) -> bool:
        """Whether a value that may be read as the JSON text ``json``, complete or not, or as the
        text ``raw`` is the former. Where both are allowed, text that could be a number or a truth
        value is text.
        """
        kinds = self.kinds(part)
        kind = _kind_of_text(json)
        as_json, as_text = kind in kinds, "string" in kinds
        if self._listed(part):
            as_json = as_json and self.allows(part, decoded_or_none(json))
            as_text = as_text and self.allows(part, raw)
        elif kinds == KINDS:
            return True
        if as_json and as_text:
            return kind in ("null", "array", "object")
        return as_json or (not as_text and kind != "null")

    def allows(self, part: Any, value: Any) -> bool:
        """Whether ``value`` has an allowed kind and is one of those listed, if any are. No other
        keyword is looked at.
        """
        return self._allows(part, value, {}, 0)

    def resolve(self, part: dict[str, Any]) -> Any:
        """The part that the ``$ref`` of ``part`` points to; None if there is none."""
        target = part.get("$ref")
        if not isinstance(target, str) or not target.startswith("#"):
            return None
        found = self._root
        for name in filter(None, target[1:].split("/")):
            name = name.replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and name.isdecimal() and len(name) < 9 and int(name) < len(found):
                found = found[int(name)]
            elif isinstance(found, dict) and name in found:
                found = found[name]
            else:
                return None
        return found

    def _layers(self, part: Any) -> Iterator[dict[str, Any]]:
        """``part`` and the objects that it is combined from."""
        waiting = [part]
        seen: set[int] = set()
        for item in waiting:
            if isinstance(item, dict) and id(item) not in seen:
                seen.add(id(item))
                yield item
                waiting.append(self.resolve(item))
                waiting += self._options(item, (*UNIONS, "allOf"))

    @staticmethod
    def _options(part: dict[str, Any], names: Iterable[str]) -> Iterator[Any]:
        for name in names:
            options = part.get(name)
            yield from options if isinstance(options, list) else ()

    def _kinds_of(self, part: Any, depth: int) -> frozenset[str]:
        if not isinstance(part, dict) or depth > _MAX_DEPTH:
            return KINDS
        if id(part) not in self._kinds:
            self._kinds[id(part)] = KINDS  # the answer for a part that refers to itself
            self._kinds[id(part)] = self._find_kinds(part, depth + 1)
        return self._kinds[id(part)]

    def _find_kinds(self, part: dict[str, Any], depth: int) -> frozenset[str]:
        kinds = KINDS & _typed(part.get("type"))
        if (listed := _listed(part)) is not None:
            kinds &= frozenset(map(kind_of, listed))
        target = self.resolve(part)
        parts = [*self._options(part, ["allOf"]), *([] if target is None else [target])]
        for each in parts:
            kinds &= self._kinds_of(each, depth)
        for name in UNIONS:
            options = [self._kinds_of(option, depth) for option in self._options(part, [name])]
            kinds &= frozenset().union(*options) if options else KINDS
        if kinds == KINDS and not _STRING_KEYWORDS.isdisjoint(part):
            kinds = TEXT
        return kinds | {"null"} if part.get("nullable") is True else kinds

    def _listed(self, part: Any) -> bool:
        """Whether the values of ``part`` or of one of its layers are listed."""
        return any(_listed(layer) is not None for layer in self._layers(part))

    def _allows(self, part: Any, value: Any, seen: dict[int, bool], depth: int) -> bool:
        if not isinstance(part, dict) or depth > _MAX_DEPTH:
            return part is not False
        if id(part) not in seen:
            seen[id(part)] = True
            seen[id(part)] = self._check(part, value, seen, depth + 1)
        return seen[id(part)]

    def _check(self, part: dict[str, Any], value: Any, seen: dict[int, bool], depth: int) -> bool:
        if value is None and part.get("nullable") is True:
            return True
        listed = _listed(part)
        if kind_of(value) not in _typed(part.get("type")) or (listed is not None and not _in(value, listed)):
            return False
        target = self.resolve(part)
        if target is not None and not self._allows(target, value, seen, depth):
            return False
        if not all(self._allows(each, value, seen, depth) for each in self._options(part, ["allOf"])):
            return False
        unions = (list(self._options(part, [name])) for name in UNIONS)
        return all(any(self._allows(each, value, seen, depth) for each in union) for union in unions if union)


def kind_of(value: Any) -> str:
    """The kind of a decoded JSON value."""
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "number"
    if isinstance(value, str):
        return "string"
    return "object" if isinstance(value, dict) else "array" if isinstance(value, list) else "null"


def _kind_of_text(json: str) -> str:
    """The kind of a JSON text, by its first character."""
    kinds = {"{": "object", "[": "array", '"': "string", "n": "null", "t": "boolean", "f": "boolean"}
    return kinds.get(json[:1], "number")


def _typed(type: Any) -> frozenset[str]:
    """The kinds that the keyword ``type`` allows."""
    names = [type] if isinstance(type, str) else type if isinstance(type, list) else []
    found = frozenset("number" if name == "integer" else name for name in names if isinstance(name, str))
    return found & KINDS or KINDS


def _listed(part: dict[str, Any]) -> list[Any] | None:
    """The values that ``enum`` or ``const`` allow; None where any are."""
    if "const" in part:
        return [part["const"]]
    enum = part.get("enum")
    return enum if isinstance(enum, list) else None


def _in(value: Any, listed: list[Any]) -> bool:
    return any(value == other and kind_of(value) == kind_of(other) for other in listed)
