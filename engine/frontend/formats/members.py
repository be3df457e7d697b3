"""The grammar of the arguments of a call between tags: the members of an object, in the order of
its schema, each a key and a value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import msgspec

from .json_schema import followed
from .lark import Lark
from .parameters import KINDS, UNIONS, Parameters
from .tagged_call import Markup
from .text_patterns import ANY, searching, text_patterns

MAX_ALTERNATIVES = 256
MAX_DEPTH, MAX_STEPS = 64, 16384  # bounds on references and combinations
MAX_COUNTED = 64  # members of a schema that bounds their number
_NAME = r"[^<>\s]+( [^<>\s]+)*"
_COMBINED = frozenset({"$ref", "allOf", "nullable", *UNIONS})
_NOTES = frozenset({"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"})

_DEFINITIONS = ("$defs", "definitions")
_SIGNS = (("array", r"\["), ("object", r"\{"))

All = tuple[dict[str, Any], ...]  # schemas without combinations, each of which a value must follow


@dataclass(slots=True)
class _Shape:
    """The members that an object may have. ``others``: key patterns with the schemas of members
    that are not listed.
    """

    parts: dict[str, Any] = field(default_factory=dict)
    required: set[str] = field(default_factory=set)
    others: list[tuple[list[str], Any]] = field(default_factory=list)
    least: int = 0
    most: int | None = None


class TaggedMembers:
    """Writes the members that follow ``schema``, which is well-formed; ``line`` is the expression
    between tags. Raises ValueError for a schema that cannot be followed.
    """

    def __init__(self, lark: Lark, schema: dict[str, Any], markup: Markup, line: str) -> None:
        self._lark = lark
        self._markup = markup
        self._line = line
        pad = "\n" if markup.padded else ""
        self._gap = f"{line} {lark.tag(markup.value)}" if markup.value else lark.text(pad)
        self._value_end = pad + markup.value_end
        # A text that holds the end without its line break would be read as ended there.
        self._ending = [f"{ANY}{_escaped(markup.value_end)}{ANY}"] if pad else []
        self._root = followed(schema)
        self._parameters = Parameters(self._root)
        self._steps = 0

    def expression(self) -> str:
        """The members, for a schema that allows any object."""
        if not self._root:
            return '""'
        alternatives = self._alternatives(self._root, ())
        objects = [each for each in alternatives if "object" in self._kinds(each)]
        if not objects:
            raise ValueError("it allows no object")
        return self._lark.either(self._members(self._shape(each)) for each in objects)

    def _alternatives(self, part: Any, trail: tuple[int, ...]) -> list[All]:
        """The alternatives that ``part`` allows, with references and combinations resolved."""
        if isinstance(part, bool):
            return [()] if part else []
        self._steps += 1
        if id(part) in trail:
            raise ValueError("$ref refers to itself")
        if len(trail) > MAX_DEPTH or self._steps > MAX_STEPS:
            raise ValueError("too many references and combinations")
        trail = (*trail, id(part))
        plain = {key: value for key, value in part.items() if key not in _COMBINED}
        choices: list[list[All]] = [[(plain,)]]
        if "$ref" in part:
            target = self._parameters.resolve(part)
            if target is None:
                raise ValueError(f"$ref {part['$ref']!r} does not exist")
            choices.append(self._alternatives(target, trail))
        choices += [self._alternatives(each, trail) for each in part.get("allOf", ())]
        for name in UNIONS:
            if name in part:
                choices.append([found for each in part[name] for found in self._alternatives(each, trail)])
        size = 1
        for choice in choices:
            size *= len(choice)
        if size > MAX_ALTERNATIVES:
            raise ValueError(f"more than {MAX_ALTERNATIVES} alternatives")
        found = [tuple(each for alternative in way for each in alternative) for way in product(*choices)]
        return [*found, ({"type": "null"},)] if part.get("nullable") is True else found

    def _kinds(self, all_of: All) -> frozenset[str]:
        kinds = KINDS
        for each in all_of:
            kinds &= Parameters(each).kinds(each)
        return kinds

    # ------------------------------------------------------------------ members

    def _shape(self, all_of: All) -> _Shape:
        shape = _Shape()
        unlisted: list[Any] = []
        for each in all_of:
            for key, part in each.get("properties", {}).items():
                shape.parts[key] = {"allOf": [shape.parts[key], part]} if key in shape.parts else part
            shape.required |= set(each.get("required", ()))
            shape.least = max(shape.least, each.get("minProperties", 0))
            unlisted += [each["additionalProperties"]] if "additionalProperties" in each else []
        shape.most = min((each["maxProperties"] for each in all_of if "maxProperties" in each), default=None)
        patterns = {key: part for each in all_of for key, part in each.get("patternProperties", {}).items()}
        rest: Any = False if False in unlisted else {"allOf": unlisted} if unlisted else True
        for name in sorted(shape.required - shape.parts.keys()):
            if rest is False:
                raise ValueError(f"required: {name!r} is none of properties")
            shape.parts[name] = rest
        shape.others = [([searching(pattern)], part) for pattern, part in patterns.items()]
        wanted = bool(unlisted) or shape.least > len(shape.parts)
        listed = any("properties" in each for each in all_of)
        if rest is not False and (wanted or not (listed or shape.parts or patterns)):
            shape.others.append(([], rest))
        return shape

    def _members(self, shape: _Shape) -> str:
        num_required = len(shape.required)
        least = max(0, shape.least - num_required)
        most = None if shape.most is None else shape.most - num_required
        if most is not None and most < least:
            raise ValueError(f"maxProperties {shape.most} is too small")
        members = [
            (self._member(self._text(key), part), key in shape.required)
            for key, part in shape.parts.items()
            if part is not False or key in shape.required
        ]
        other = self._other(shape)
        if not least and most is None:
            listed = [member + ("" if needed else "?") for member, needed in members]
            return " ".join([*listed, f"{other}*" if other else '""'])
        if len(members) > MAX_COUNTED:
            raise ValueError(f"minProperties and maxProperties with more than {MAX_COUNTED} properties")
        found = self._counted(members, other, least, most)
        if found is None:
            raise ValueError(f"minProperties {shape.least}: there are not as many properties")
        return found

    def _counted(
        self, members: Sequence[tuple[str, bool]], other: str, least: int, most: int | None
    ) -> str | None:
        """``members`` with at least ``least`` and at most ``most`` that are not required; None if
        there are not so many. Members that are not listed count once, because they may be equal.
        """
        # ways[low, high]: the rest of the members, with from low to high more that are not required
        room = 0 if most is None else most
        ways: dict[tuple[int, int], str | None] = {}
        for low in range(least + 1):
            for high in range(room + 1):
                ways[low, high] = _repeated(other, low, None if most is None else high)
        for member, needed in reversed(members):
            before, ways = ways, {}
            for (low, high), rest in before.items():
                taken = before.get((max(0, low - 1), high - 1 if most is not None else high))
                without = None if rest is None else rest if not needed else f"{member} {rest}"
                options = [] if without is None else [without]
                if not needed and taken is not None:
                    options.append(f"{member} {taken}")
                ways[low, high] = self._lark.named(self._lark.either(options)) if options else None
        return ways[least, room]

    def _other(self, shape: _Shape) -> str:
        """Any one member that is not listed; empty if there may be none."""
        listed = [searching(f"^{_escaped(key)}$") for key in shape.parts]
        if self._markup.string:  # a key's end begins and ends with a quote, so it could begin too early
            listed.append(f'{ANY}"{ANY}')
        written = [
            self._member(self._lark.matching([_NAME, *patterns], self._markup.key_end, unlike=listed), part)
            for patterns, part in shape.others
        ]
        return self._lark.named(self._lark.either(written)) if written else ""

    def _text(self, key: str) -> str:
        for key_end in self._markup.key_ends:
            if (key + key_end).find(key_end) < len(key):
                raise ValueError(f"the model cannot write a property named {key!r}: it holds {key_end}")
        return f"{self._lark.text(key)} {self._lark.tag(self._markup.key_end)}"

    def _member(self, key: str, part: Any) -> str:
        return f"({self._lark.tag(self._markup.key)} {key} {self._gap} {self._value(part)} {self._line})"

    # ------------------------------------------------------------------ values

    def _value(self, part: Any) -> str:
        """A value and the tag that ends it."""
        alternatives = self._alternatives(part, ())
        if all(set(each) <= _NOTES for all_of in alternatives for each in all_of) and alternatives:
            return self._any()
        kinds = frozenset[str]().union(*map(self._kinds, alternatives))
        if not kinds:
            raise ValueError("a property allows no value")
        if "string" not in kinds:
            return self._json(part)
        listed = [self._listed(each) for each in alternatives]
        free = any(
            values is None and "string" in self._kinds(each)
            for each, values in zip(alternatives, listed, strict=True)
        )
        written: list[str] = []
        for each, values in zip(alternatives, listed, strict=True):
            if values is not None:
                written += [self._literal(value) for value in values if self._fits(_as_text(value))]
            else:
                written += self._free(each, kinds, numbers=not free)
        if not written:
            raise ValueError("a property allows no value")
        return self._lark.either(dict.fromkeys(written))

    def _listed(self, all_of: All) -> list[Any] | None:
        """The values that ``enum`` or ``const`` allow; None where any are."""
        lists = [[each["const"]] if "const" in each else each.get("enum") for each in all_of]
        known = [values for values in lists if values is not None]
        if not known:
            return None
        return [value for value in known[0] if all(_allows(each, value) for each in all_of)]

    def _free(self, all_of: All, kinds: frozenset[str], numbers: bool) -> list[str]:
        """Values of one alternative. Excludes text that the parser would take for a JSON value."""
        own = self._kinds(all_of)
        told = bool(self._markup.string)
        written = []
        if "string" in own:
            taken = [rf"\s*{sign}{ANY}" for kind, sign in _SIGNS if kind in kinds and not told]
            written.append(self._free_text(text_patterns(all_of), taken))
        if "null" in own:
            written.append(self._literal(None))
        others = ("array", "object", "number", "boolean") if numbers or told else ("array", "object")
        for kind in sorted(own.intersection(others)):
            schema = {**all_of[0]} if len(all_of) == 1 else {"allOf": [*all_of]}
            if kind == "number" and any(each.get("type") == "integer" for each in all_of):
                kind = "integer"
            written.append(self._json({**schema, "type": kind}))
        return written

    def _free_text(self, patterns: list[str], unlike: Sequence[str] = ()) -> str:
        """Text that all of ``patterns`` match and none of ``unlike``, and the end of the value."""
        text = self._lark.matching(patterns, self._value_end, [*unlike, *self._ending])
        return f"{self._told(True)}{text}"

    def _any(self) -> str:
        """Any value, and its end."""
        text = self._free_text([])
        return self._lark.either([text, self._json({})]) if self._markup.json else text

    def _literal(self, value: Any) -> str:
        """One value and its end."""
        told = self._told(isinstance(value, str))
        return f"{told}{self._lark.text(_as_text(value))} {self._lark.tag(self._value_end)}"

    def _told(self, is_string: bool) -> str:
        """The expression of the tag that gives the kind of the following value; empty for none."""
        told = self._markup.string if is_string else self._markup.json
        return f"{self._lark.text(told)} " if told else ""

    def _fits(self, text: str) -> bool:
        """Whether ``text`` as a value ends where the parser finds its end."""
        return self._markup.value_end not in text

    def _json(self, part: Any) -> str:
        """A JSON value and its end."""
        if isinstance(part, dict):
            part = {**part, **{name: self._root[name] for name in _DEFINITIONS if name in self._root}}
        return f"{self._told(False)}{self._lark.json(part)} {self._lark.tag(self._value_end)}"


def _repeated(other: str, least: int, most: int | None) -> str | None:
    """``other`` from ``least`` to ``most`` times; None if that cannot be expressed."""
    if least > 1 or (least and not other) or (most is not None and most < least):
        return None
    if not other or most == 0:
        return '""'
    return f"{other}{{{least},{'' if most is None else most}}}"


def _allows(schema: dict[str, Any], value: Any) -> bool:
    """Whether ``schema`` allows a listed value, by its kind, its length and what is listed."""
    if not Parameters(schema).allows(schema, value):
        return False
    size = len(value) if isinstance(value, str) else 0
    too_long = isinstance(value, str) and size > schema.get("maxLength", size)
    return not too_long and (not isinstance(value, str) or size >= schema.get("minLength", 0))


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _escaped(text: str) -> str:
    return "".join(f"\\{char}" if char in r"\.+*?()|[]{}^$#&-~/" else char for char in text)
