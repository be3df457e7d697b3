"""Keywords of JSON Schema: followed, left out where they say nothing, refused where a grammar
cannot hold them. A table has the decision for each.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from lockstep.engine.frontend.formats.json_schema import SchemaFault, followed
from lockstep.engine.text.matcher import new_matcher
from support.engine.text.byte_vocabulary import byte_vocabulary

OBJECT = {"type": "object", "properties": {"a": {"type": "integer"}}}
TEXT = {"type": "string"}
KEYWORD_VALUE = {"format": "password", "not": 1}
ARRAY = {"type": "array", "items": {"type": "integer"}}
UNKNOWN_FORMATS = (
    "password",
    "path",
    "binary",
    "byte",
    "base64url",
    "regex",
    "int32",
    "any thing",
    "",
    "unknown",
)

SAYS_NOTHING = [
    *({**TEXT, "format": name} for name in UNKNOWN_FORMATS),
    {**TEXT, "format": None},
    {**TEXT, "format": 5},
    {"type": "integer", "format": "int64"},
    {**TEXT, "contentEncoding": "base64", "contentMediaType": "image/png", "contentSchema": {}},
    *({**OBJECT, "$schema": value} for value in ("urn:x", "https://json-schema.org/draft-07/schema#", 5)),
    {**OBJECT, "$id": "https://x.test/y", "$anchor": "a", "$comment": "c", "$vocabulary": {}},
    {**OBJECT, "$dynamicAnchor": "node"},
    {**OBJECT, "title": "t", "description": "d", "default": {}, "examples": [1], "deprecated": True},
    {**OBJECT, "readOnly": True, "nullable": True, "discriminator": {"propertyName": "a"}, "x-own": [{}]},
    {**OBJECT, "x-own": {"properties": [], "enum": "none", "not": {}}},
    {**OBJECT, "unevaluatedProperties": True},
    {**OBJECT, "dependentRequired": {}, "dependentSchemas": {"a": {}}, "dependencies": {"a": []}},
    {**OBJECT, "propertyNames": {}},
    {**OBJECT, "then": {"required": ["b"]}},
    {**OBJECT, "if": {"required": ["a"]}, "then": True},
    {**OBJECT, "not": False},
    {**ARRAY, "uniqueItems": False},
    {**ARRAY, "minContains": 0},
    {**ARRAY, "contains": {}, "minContains": 0},
    {**ARRAY, "unevaluatedItems": {}},
]
FOLLOWED = [
    ({**TEXT, "format": "date"}, "2026-01-31", "31st"),
    ({**TEXT, "format": "password", "pattern": "^a+$"}, "aa", "b"),
    ({**OBJECT, "unevaluatedProperties": False}, {"a": 1}, {"b": 1}),
    ({**ARRAY, "prefixItems": [TEXT], "unevaluatedItems": False}, ["a", 1], ["a", "b"]),
    ({"type": "array", "prefixItems": [TEXT], "unevaluatedItems": False}, ["a"], ["a", 1]),
    ({**ARRAY, "uniqueItems": True, "maxItems": 1}, [1], [1, 2]),
    ({**ARRAY, "minItems": 2.0}, [1, 2], [1]),
    ({**ARRAY, "minItems": 30}, list(range(30)), list(range(29))),
    (
        {"type": "object", "patternProperties": {"^x": ARRAY}, "additionalProperties": False},
        {"x": [1]},
        {"y": 1},
    ),
    ({"type": "integer", "multipleOf": 7}, 21, 22),
    ({"type": "number", "multipleOf": 0.01}, 0.25, 0.255),
    (
        {**OBJECT, "properties": {"format": {"const": {"format": "password", "not": 1}}}},
        {"format": {"format": "password", "not": 1}},
        {"format": 1},
    ),
    ({"enum": [{"not": {}}, {"$dynamicRef": "x"}]}, {"$dynamicRef": "x"}, {}),
    (
        {**OBJECT, "properties": {"not": {"type": "integer"}, "uniqueItems": TEXT}},
        {"not": 1, "uniqueItems": "x"},
        {"not": "x"},
    ),
    ({"$ref": "#/components/P", "components": {"P": {**TEXT, "format": "password"}}}, "x", 1),
    ({"oneOf": [{"const": "a"}, {"type": "integer"}]}, "a", "b"),
    (
        {"$defs": {"n": {"type": "array", "items": {"$ref": "#/$defs/n"}}}, "$ref": "#/$defs/n"},
        [[], [[]]],
        [1],
    ),
]
REFUSED = [
    ({**OBJECT, "not": {"required": ["b"]}}, "not"),
    ({**OBJECT, "if": {}, "then": {"required": ["a"]}}, "if"),
    ({**OBJECT, "if": {}, "else": False}, "if"),
    ({**OBJECT, "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
    ({**OBJECT, "dependentSchemas": {"a": False}}, "dependentSchemas"),
    ({**OBJECT, "dependencies": {"a": ["b"]}}, "dependencies"),
    ({**OBJECT, "propertyNames": {"pattern": "^a"}}, "propertyNames"),
    ({**OBJECT, "unevaluatedProperties": False, "allOf": [OBJECT]}, "unevaluatedProperties"),
    ({**ARRAY, "uniqueItems": True}, "uniqueItems"),
    ({**ARRAY, "contains": {}}, "contains"),
    ({**ARRAY, "unevaluatedItems": False, "anyOf": [ARRAY]}, "unevaluatedItems"),
    ({"$dynamicRef": "#node"}, "$dynamicRef"),
    ({"$recursiveRef": "#"}, "$recursiveRef"),
    ({"type": "object", "properties": {"p": {"anyOf": [TEXT, {"not": {}}]}}}, "properties.p.anyOf[1].not"),
    ({"$defs": {"x": {**ARRAY, "uniqueItems": True}}, "$ref": "#/$defs/x"}, "$defs.x.uniqueItems"),
    ({"items": [TEXT, {"items": {"contains": TEXT}}]}, "items[1].items.contains"),
    ({"type": "object", "properties": None}, "properties should be an object"),
    ({"type": "object", "properties": []}, "properties should be an object"),
    ({"type": "object", "properties": {"x": {"enum": None}}}, "properties.x.enum should be a list"),
    ({"type": "object", "required": "a"}, "required should be a list"),
    ({"type": "object", "required": [1]}, "required should be a list of names"),
    ({"dependentRequired": None}, "dependentRequired should be an object"),
    ({"anyOf": {}}, "anyOf should be a list"),
]


def takes(schema: Any, value: Any) -> bool:
    matcher = new_matcher(byte_vocabulary(), f"start: %json {json.dumps(schema)}")
    assert not matcher.is_error(), matcher.get_error()
    text = json.dumps(value).encode()
    return matcher.try_consume_tokens(list(text)) == len(text) and matcher.is_accepting()


@pytest.mark.parametrize("schema", SAYS_NOTHING, ids=json.dumps)
def test_keywords_that_say_nothing(schema: dict[str, Any]) -> None:
    values = {"string": "any text", "object": {"a": 1, "b": 2}, "array": [1, 1], "integer": 3}
    for inside in (schema, {"type": "array", "items": schema}, {"anyOf": [{"type": "null"}, schema]}):
        assert not new_matcher(byte_vocabulary(), f"start: %json {json.dumps(followed(inside))}").is_error()
    assert takes(followed(schema), values[schema["type"]])


@pytest.mark.parametrize(("schema", "good", "bad"), FOLLOWED, ids=json.dumps)
def test_keywords_that_are_followed(schema: dict[str, Any], good: Any, bad: Any) -> None:
    before = json.dumps(schema)
    assert takes(followed(schema), good)
    assert not takes(followed(schema), bad)
    assert followed(followed(schema)) == followed(schema)
    assert json.dumps(schema) == before, "the request's own schema is left as it is"


@pytest.mark.parametrize(("schema", "path"), REFUSED, ids=json.dumps)
def test_keywords_that_a_grammar_cannot_hold(schema: dict[str, Any], path: str) -> None:
    with pytest.raises(SchemaFault) as refused:
        followed(schema)
    assert str(refused.value).startswith(path)


@pytest.mark.parametrize("schema", [True, False, {}, None, 3, [], "x"])
def test_what_has_no_keywords_is_left_to_the_library(schema: Any) -> None:
    assert followed(schema) == schema
