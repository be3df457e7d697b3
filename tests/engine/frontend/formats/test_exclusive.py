"""``oneOf``: held where its members exclude one another, above all the unions that pydantic writes;
what is written always follows the schema.
"""

from __future__ import annotations

import json
import time
from typing import Annotated, Any, Literal

import jsonschema
import pytest
from hypothesis import given, settings, strategies as st
from pydantic import BaseModel, Field

from lockstep.engine.frontend.formats.exclusive import exclusive
from lockstep.engine.frontend.formats.json_schema import followed
from lockstep.engine.text.matcher import new_matcher
from support.engine.text.byte_vocabulary import byte_vocabulary


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int


class Dog(BaseModel):
    kind: Literal["dog", "puppy"] = "dog"
    name: str


class Owner(BaseModel):
    pets: list[Annotated[Cat | Dog, Field(discriminator="kind")]]


def is_held(schema: Any) -> bool:
    return not new_matcher(byte_vocabulary(), f"start: %json {json.dumps(followed(schema))}").is_error()


def takes(schema: Any, value: Any) -> bool:
    matcher = new_matcher(byte_vocabulary(), f"start: %json {json.dumps(followed(schema))}")
    assert not matcher.is_error(), matcher.get_error()
    text = json.dumps(value).encode()
    return matcher.try_consume_tokens(list(text)) == len(text) and matcher.is_accepting()


def test_a_union_told_apart_by_a_property_is_held() -> None:
    schema = Owner.model_json_schema()
    assert "oneOf" in json.dumps(schema)
    cat, dog = {"kind": "cat", "lives": 9}, {"kind": "puppy", "name": "Rex"}
    assert takes(schema, {"pets": [cat, dog]})
    assert not takes(schema, {"pets": [{"kind": "cat", "name": "Rex"}]})
    assert not takes(schema, {"pets": [{"kind": "cow", "name": "Rex"}]})
    # Both members allow this one, which Dog alone is meant to; its kind has to be written.
    assert not takes(schema, {"pets": [{"name": "Rex"}]})


def tagged(value: Any, **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"t": {"const": value}, **more}, "required": ["t"]}


TEXT, NUMBER, NULL = {"type": "string"}, {"type": "number"}, {"type": "null"}
OBJECT = {"type": "object", "properties": {"a": TEXT}, "required": ["a"]}


@pytest.mark.parametrize(
    "members",
    [
        [TEXT, NULL],
        [TEXT, {"type": ["integer", "null"]}, OBJECT],
        [{"const": "a"}, {"enum": ["b", None]}, NUMBER],
        [tagged("a"), tagged("b", x=NUMBER), NULL],
        [{"properties": {"t": {"enum": ["a"]}}, "type": "object"}, tagged("b")],
        [OBJECT],
        [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}],
    ],
)
def test_members_that_exclude_one_another(members: list[Any]) -> None:
    schema = {"oneOf": members, "$defs": {"a": tagged("a"), "b": {"$ref": "#/$defs/c"}, "c": tagged("c")}}
    assert exclusive(members, None, schema) is not None
    assert is_held(schema)


@pytest.mark.parametrize(
    "members",
    [
        [TEXT, {"type": ["string", "null"]}],
        [NUMBER, {"type": "integer"}],
        [TEXT, {"const": "a"}],
        [{"enum": ["a", "b"]}, {"enum": ["b", "c"]}],
        [tagged("a"), tagged("a")],
        [tagged("a"), OBJECT],
        [tagged(1), tagged(1.0)],
        [{"$ref": "#/$defs/none"}, TEXT],
        [{"$ref": "#/$defs/loop"}, TEXT],
        [True, TEXT],
    ],
)
def test_members_that_may_overlap(members: list[Any]) -> None:
    assert exclusive(members, None, {"oneOf": members, "$defs": {"loop": {"$ref": "#/$defs/loop"}}}) is None


def test_a_discriminator_names_the_property() -> None:
    both = [
        {"type": "object", "properties": {"a": {"const": one}, "b": {"const": two}}}
        for one, two in ("xy", "zy")
    ]
    assert exclusive(both, {"propertyName": "b"}, {}) is None
    assert exclusive(both, {"propertyName": "a"}, {}) == exclusive(both, None, {}) != both


leaves = st.sampled_from(
    [TEXT, NUMBER, NULL, {"type": "integer"}, {"const": "a"}, {"enum": ["a", "b", None]}]
)
objects = st.builds(
    lambda properties, required: {"type": "object", "properties": properties, "required": required},
    st.dictionaries(st.sampled_from("xy"), leaves, max_size=2),
    st.lists(st.sampled_from("xy"), max_size=2, unique=True),
)
values = st.recursive(
    st.sampled_from(["a", "b", "c", 1, 1.5, None, True]),
    lambda inner: st.dictionaries(st.sampled_from("xyz"), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=300)
@given(members=st.lists(leaves | objects, min_size=2, max_size=4), tries=st.lists(values, max_size=8))
def test_what_is_held_follows_the_schema(members: list[Any], tries: list[Any]) -> None:
    held = exclusive(members, None, {})
    for value in tries:
        if held is not None and jsonschema.Draft202012Validator({"anyOf": held}).is_valid(value):
            jsonschema.validate(value, {"oneOf": members})


def test_many_members_cost_no_more_than_their_size() -> None:
    def seconds(count: int) -> float:
        members = [tagged(f"v{number}") for number in range(count)]
        start = time.thread_time()
        assert exclusive(members, None, {}) is not None
        return time.thread_time() - start

    assert min(seconds(8000) for _ in range(3)) < 12 * min(seconds(2000) for _ in range(3)) + 0.01
