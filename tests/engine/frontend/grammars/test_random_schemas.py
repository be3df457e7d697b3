"""Random JSON schemas: each is refused, or a rank follows it to an end that is valid JSON of it."""

from __future__ import annotations

import json
import random
from functools import cache
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings, strategies as st

from lockstep.engine.frontend.formats.json_schema import SchemaFault
from lockstep.engine.frontend.formats.lark import Lark
from lockstep.engine.frontend.grammars.trial import Trial
from lockstep.engine.rank.grammars import Grammars
from support.engine.text.byte_vocabulary import END, byte_vocabulary

MOST_TOKENS = 1500
NAMES = ("a", "b", "long name", 'q"\\', "é", "format", "not", "properties")
FORMATS = ("date", "ipv4", "uuid", "password", "regex", "nothing")
PATTERNS = ("^[a-c]{2,4}$", "x+", "^(ab|cd)*$", "[0-9]{3}-[0-9]", "^$", "(", ".*a.{3}")

constants = st.one_of(
    st.none(), st.booleans(), st.integers(-99, 99), st.sampled_from(["", "a", "東京", "</tag>"])
)
small = st.integers(0, 4)


def some_of(**keywords: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=keywords)


texts = some_of(
    minLength=small,
    maxLength=small,
    pattern=st.sampled_from(PATTERNS),
    format=st.sampled_from(FORMATS),
    contentEncoding=st.just("base64"),
).map(lambda keywords: {"type": "string", **keywords})
numbers = some_of(
    minimum=st.integers(-50, 50),
    maximum=st.integers(-50, 50),
    exclusiveMinimum=st.integers(-50, 50),
    multipleOf=st.integers(1, 9),
).map(lambda keywords: {"type": "integer", **keywords})
leaves = st.one_of(
    texts,
    numbers,
    st.builds(lambda value: {"const": value}, constants),
    st.builds(lambda values: {"enum": values}, st.lists(constants, max_size=4)),
    st.sampled_from([{"type": "null"}, {"type": ["boolean", "null"]}, {}, True]),
)


def larger(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    objects = some_of(
        properties=st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
        required=st.lists(st.sampled_from(NAMES), max_size=3, unique=True),
        additionalProperties=st.one_of(st.booleans(), inner),
        unevaluatedProperties=st.booleans(),
        minProperties=st.integers(0, 2),
        propertyNames=st.just({}),
    ).map(lambda keywords: {"type": "object", **keywords})
    arrays = some_of(
        items=st.one_of(inner, st.just({"$ref": "#"})),
        prefixItems=st.lists(inner, min_size=1, max_size=2),
        minItems=small,
        maxItems=small,
        uniqueItems=st.sampled_from([False, False, False, True]),
    ).map(lambda keywords: {"type": "array", **keywords})
    choices = st.builds(
        lambda key, parts: {key: parts},
        st.sampled_from(["anyOf", "oneOf", "allOf"]),
        st.lists(inner, min_size=1, max_size=3),
    )
    return st.one_of(objects, arrays, choices)


schemas = st.recursive(leaves, larger, max_leaves=8)


@cache
def trial() -> Trial:
    return Trial(byte_vocabulary())


def walk(grammar: str, seed: int) -> str | None:
    """A text that a rank writes, choosing at random among the tokens it may sample; None for one
    that does not end soon.
    """
    chance, tokens = random.Random(seed), []
    slot, stops = np.zeros(1, np.int64), np.array([END], np.int32)
    rank = Grammars(byte_vocabulary())
    try:
        rank.stage(0, grammar, np.zeros(0, np.int32))
        told: list[tuple[int, str]] = []
        while not told:
            told = rank.take_compiled()
        assert told == [(0, "")]
        rank.admit(0, 0, stops)
        while len(tokens) < MOST_TOKENS:
            masks = rank.begin(slot)
            assert masks is not None
            allowed = np.flatnonzero(np.unpackbits(masks.take(slot)[1].view(np.uint8), bitorder="little"))
            closing = [token for token in allowed.tolist() if token == END or token in b'"]}']
            token = chance.choice(closing if closing and chance.random() < 0.4 else allowed.tolist())
            assert rank.observe(slot, np.array([token], np.int64)) == {}, bytes(tokens)
            if token == END:
                return bytes(tokens).decode()
            tokens.append(token)
        return None
    finally:
        rank.close()


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(schema=schemas, seed=st.integers(0, 1000))
def test_a_random_schema_is_refused_or_followed_to_a_valid_end(schema: Any, seed: int) -> None:
    lark = Lark(lambda tag: None)
    try:
        grammar = lark.finish(lark.json(schema))
    except SchemaFault:
        event("refused by keyword")
        return
    fault = trial().fault(grammar)
    if fault:
        event("refused by trial")
        assert "\n" not in fault
        return
    text = walk(grammar, seed)
    if text is None:
        event("no end")
        return
    if _repeats_a_name(text):  # no grammar knows the names that were free and are taken
        event("a name twice")
        return
    event("followed")
    jsonschema.Draft202012Validator(schema).validate(json.loads(text))


def _repeats_a_name(text: str) -> bool:
    found = False

    def members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal found
        found = found or len({name for name, _ in pairs}) < len(pairs)
        return dict(pairs)

    json.loads(text, object_pairs_hook=members)
    return found


def test_a_name_that_is_written_twice_is_found() -> None:
    assert _repeats_a_name('[{"a": 1, "b": {"": 1, "": 2}}]')
    assert not _repeats_a_name('[{"a": {"a": 1}}, {"a": 2}]')


def test_the_walk_can_fail() -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(json.loads(walk('start: "[1]"', 0) or ""), {"type": "object"})
