"""Forced calls whose arguments stand between tags follow the schema of their function: random
walks of the grammar are read back as arguments that a validator accepts.
"""

from __future__ import annotations

import json
import random
import time
from functools import cache
from typing import Any

import jsonschema
import pytest
from llguidance import LLMatcher, LLTokenizer

from lockstep.engine.frontend.api.errors import ApiError
from lockstep.engine.frontend.api.schemas import ChatRequest
from lockstep.engine.frontend.formats.choice import TOOL_FORMATS, Formats, Manner
from lockstep.engine.frontend.formats.dsml import MARKUP, SIGN
from lockstep.engine.frontend.formats.glm import Glm
from lockstep.engine.frontend.formats.hy import Hy3
from lockstep.engine.frontend.formats.minimax import SECTION, SECTION_END
from lockstep.engine.frontend.formats.text_patterns import FORMATS, searching
from lockstep.engine.frontend.grammars.trial import Trial
from lockstep.engine.frontend.requests.structure import grammar_of
from support.engine.frontend.replies import VALUE_ENDS

END = 256
ENDS = frozenset(b'<}]"')
ONE_TOKEN = (*Glm.markers, SECTION, SECTION_END, *Hy3.markers, SIGN)  # tags that the models' tokenizers hold
TAGS = {tag: END + 1 + index for index, tag in enumerate(ONE_TOKEN)}
# glm47 differs from glm4 by line breaks alone, hy_v3_preview from hy_v3 by the names of its tags.
FORMATS_HELD = ("deepseek_v32", "glm4", "hy_v3", "minimax_m2", "qwen3_coder")


class Vocabulary:
    """The 256 bytes, an end token and the tags."""

    is_tokenizer_wrapper = True
    eos_token_id = END
    bos_token_id = None
    special_token_ids = (END, *TAGS.values())
    tokens = (*(bytes([byte]) for byte in range(256)), b"<end>", *(tag.encode() for tag in TAGS))

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


@cache
def vocabulary() -> LLTokenizer:
    return LLTokenizer(Vocabulary())  # type: ignore[arg-type]


@cache
def trial() -> Trial:
    return Trial(vocabulary())


def forced(parameters: Any, format: str = "glm4", choice: Any = "required") -> tuple[ChatRequest, Manner]:
    function = {"name": "f", "parameters": parameters}
    ask = ChatRequest.model_validate(
        {
            "messages": [{"role": "user", "content": "x"}],
            "tools": [
                {"type": "function", "function": {"name": "first"}},
                {"type": "function", "function": function},
            ],
            "tool_choice": {"type": "function", "function": {"name": "f"}} if choice == "named" else choice,
        }
    )
    tools = {"first": {}, "f": parameters or {}}
    return ask, Manner(Formats(None, TOOL_FORMATS[format]), answering=True, tools=tools, one_call=True)


def grammar(parameters: Any, format: str = "glm4", tokens: bool = True, choice: Any = "named") -> str:
    ask, manner = forced(parameters, format, choice)
    claims = grammar_of(ask, manner, TAGS.get if tokens else lambda tag: None)
    for claim in claims:
        fault = trial().fault(claim.grammar)
        if fault:
            raise claim.refused(fault)
    return claims[-1].grammar


def walk(text: str, seed: int, tokens: bool) -> str:
    """A random text of the grammar, which prefers tags and the bytes of words."""
    chance, matcher, said = random.Random(seed), LLMatcher(vocabulary(), text, log_level=0), bytearray()
    assert not matcher.is_error(), matcher.get_error()
    names = {id: tag for tag, id in TAGS.items()}
    wish: list[int] = []
    wishes = [b"\n</parameter>", b"</parameter>", b'">', b">"]
    if "parameter>" in text and "string=" in text:
        end = b"</" if f"<[{TAGS[SIGN]}]>" in text else MARKUP.value_end.encode()
        wishes = [end, MARKUP.key_end.encode()]
    for _ in range(3000):
        mask = matcher.compute_bitmask()
        allowed = [id for id in range(len(Vocabulary.tokens)) if mask[id // 8] >> id % 8 & 1]
        if matcher.is_accepting():
            return said.decode()
        assert allowed, f"no way on after {said!r}"
        tags = [id for id in allowed if id in names]
        words = [id for id in allowed if 32 <= id < 127] or allowed
        ends = [id for id in allowed if id in ENDS]
        id = chance.choice(
            tags if tags and chance.random() < 0.5 else ends if ends and chance.random() < 0.3 else words
        )
        if not wish and chance.random() < 0.2:  # or a tag of many bytes would never be found
            wish = list(chance.choice(wishes))
        if wish and wish[0] in allowed:
            id = wish.pop(0)
        else:
            wish = []
        assert matcher.consume_token(id)
        said += names[id].encode() if id in names else bytes([id])
    raise AssertionError(f"no end: {bytes(said[:300])!r}")


def arguments(parameters: Any, seed: int, tokens: bool = True, format: str = "glm4") -> Any:
    """The arguments of a random forced call, which the schema must allow."""
    text = walk(grammar(parameters, format, tokens), seed, tokens)
    parser = forced(parameters, format)[1].parser()
    assert parser is not None
    parser.push(text)
    parser.finish()
    delta = parser.take()
    assert delta.content == "", text
    [call] = delta.calls
    found = json.loads(call["function"]["arguments"])
    validator = jsonschema.Draft202012Validator(
        parameters, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
    )
    validator.validate(found)
    return found


def one(part: Any, **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"x": part}, "required": ["x"], **more}


CODE = "^[A-Z]{2}[0-9]{2}$"
DEFS = {
    "$defs": {
        "code": {"type": "string", "pattern": CODE},
        "maybe": {"anyOf": [{"$ref": "#/$defs/code"}, {"type": "null"}]},
    }
}
VALUES: list[Any] = [
    {"type": "string", "pattern": CODE},
    {"type": "string", "pattern": CODE, "description": "d"},
    {"pattern": CODE},
    {"type": "string", "maxLength": 4},
    {"type": "string", "minLength": 3, "maxLength": 5},
    {"type": "string", "pattern": "[0-9]x", "maxLength": 6},
    {"type": "string", "pattern": "^a|b$", "maxLength": 6},
    {"type": "string", "pattern": r"^(a|b)\$$"},
    {"type": "string", "const": "only"},
    {"const": "only"},
    {"enum": ["a", "b c", "<x>", ""]},
    {"enum": ["auto", 5, None, True]},
    {"type": "string", "enum": ["a", 5]},
    {"enum": [1, 2]},
    {"type": ["string", "null"], "maxLength": 3},
    {"anyOf": [{"type": "string", "pattern": CODE}, {"type": "null"}]},
    {"oneOf": [{"type": "string", "enum": ["auto"]}, {"type": "integer"}]},
    {"anyOf": [{"type": "string", "pattern": CODE}, {"type": "integer"}]},
    {"anyOf": [{"const": "all"}, {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3}]},
    {
        "anyOf": [
            {"type": "string", "maxLength": 5},
            {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
        ]
    },
    {"anyOf": [{"type": "boolean"}, {"type": "number"}]},
    {"allOf": [{"$ref": "#/$defs/code"}, {"pattern": "9"}]},
    {"$ref": "#/$defs/code"},
    {"$ref": "#/$defs/maybe"},
    {
        "type": "object",
        "properties": {"y": {"$ref": "#/$defs/code"}},
        "required": ["y"],
        "additionalProperties": False,
    },
    {"type": "array", "items": {"$ref": "#/$defs/maybe"}, "maxItems": 2},
    {"type": "integer", "minimum": 1, "maximum": 14},
    *({"type": "string", "format": name} for name in FORMATS),
]


@pytest.mark.parametrize("format", FORMATS_HELD)
@pytest.mark.parametrize("part", VALUES, ids=json.dumps)
def test_values_follow_their_schema(part: Any, format: str) -> None:
    for seed in range(6):
        arguments(one(part, **DEFS), seed, format=format)


@pytest.mark.parametrize("part", [VALUES[0], VALUES[3], VALUES[4], VALUES[5], VALUES[15]], ids=json.dumps)
def test_values_follow_their_schema_where_tags_are_plain_text(part: Any) -> None:
    for seed in range(6):
        arguments(one(part, **DEFS), seed, tokens=False)


STRING, NUMBER = {"type": "string", "maxLength": 3}, {"type": "integer"}
OBJECTS: list[Any] = [
    {"type": "object", "additionalProperties": NUMBER, "minProperties": 1},
    {"type": "object", "additionalProperties": NUMBER, "maxProperties": 2},
    {"type": "object", "additionalProperties": STRING, "properties": {"a": NUMBER}},
    {"type": "object", "properties": {"a": NUMBER, "b": STRING, "c": STRING}, "minProperties": 2},
    {"type": "object", "properties": {"a": NUMBER, "b": STRING, "c": STRING}, "maxProperties": 1},
    {
        "type": "object",
        "properties": {"a": NUMBER, "b": STRING, "c": STRING},
        "minProperties": 2,
        "maxProperties": 2,
    },
    {"type": "object", "properties": {"a": NUMBER, "b": STRING}, "required": ["b"], "minProperties": 2},
    {"type": "object", "properties": {"a": NUMBER}, "minProperties": 2},
    {"type": "object", "required": ["a"], "additionalProperties": STRING},
    {
        "type": "object",
        "patternProperties": {"^n_": NUMBER},
        "additionalProperties": False,
        "minProperties": 1,
    },
    {"type": "object", "allOf": [one(STRING), {"properties": {"y": NUMBER}, "required": ["y"]}]},
    {
        "type": "object",
        "properties": {"a": NUMBER},
        "allOf": [{"maxProperties": 0}, {"maxProperties": 3}],
    },
    {"type": "object", "anyOf": [one(STRING), {"properties": {"y": NUMBER}, "required": ["y"]}]},
    {"$ref": "#/$defs/a", "$defs": {"a": one(STRING)}},
    {"type": "object", "properties": {}},
    {"type": "object", "properties": {"a": False, "b": NUMBER}},
    {},
]


@pytest.mark.parametrize("format", FORMATS_HELD)
@pytest.mark.parametrize("parameters", OBJECTS, ids=json.dumps)
def test_members_follow_the_schema(parameters: Any, format: str) -> None:
    for seed in range(8):
        arguments(parameters, seed, format=format)


@pytest.mark.parametrize("format", FORMATS_HELD)
def test_any_value_may_be_any_text(format: str) -> None:
    for seed in range(4):
        arguments(one({"description": "anything"}), seed, format=format)
        arguments(one(True), seed, format=format)
        arguments({"type": "object", "required": ["x"]}, seed, format=format)


@pytest.mark.parametrize(
    ("format", "key"),
    [
        ("deepseek_v32", 'a" string="'),
        ("deepseek_v32", 'a">'),
        ("deepseek_v32", 'a" string='),
        ("glm4", "a</arg_key>"),
        ("minimax_m2", 'a">'),
        ("qwen3_coder", "a>b"),
    ],
)
def test_a_property_whose_name_the_format_cannot_write_is_a_400(format: str, key: str) -> None:
    with pytest.raises(ApiError, match="the model cannot write a property named"):
        grammar({"type": "object", "properties": {key: {"type": "string"}}}, format)


@pytest.mark.parametrize("format", FORMATS_HELD)
def test_a_listed_value_that_would_end_too_early_is_not_written(format: str) -> None:
    end = VALUE_ENDS[format]
    for seed in range(4):
        assert arguments(one({"enum": [f"a{end}b", "c"]}), seed, format=format) == {"x": "c"}
    with pytest.raises(ApiError, match="a property allows no value"):
        grammar(one({"enum": [f"a{end}b"]}), format)


MALFORMED: list[tuple[Any, str]] = [
    ({"type": "object", "properties": None}, ".properties should be an object (got null)"),
    ({"type": "object", "properties": []}, ".properties should be an object (got [])"),
    ({"type": "object", "required": None}, ".required should be a list of names (got null)"),
    ({"type": "object", "required": [1]}, ".required should be a list of names"),
    ({"type": "object", "required": "x"}, ".required should be a list of names"),
    (one({"type": "string", "enum": None}), ".properties.x.enum should be a list of values (got null)"),
    (one({"enum": []}), ".properties.x.enum should be a list of values"),
    (one(None), ".properties.x should be a schema"),
    (one("string"), ".properties.x should be a schema"),
    (one({"type": 5}), ".properties.x.type: Invalid type: 5"),
    (one({"type": None}), ".properties.x.type: Invalid type: null"),
    (one({"type": ["string", 5]}), ".properties.x.type: Invalid type"),
    (one({"type": "text"}), ".properties.x.type: Invalid type: text"),
    (one({"anyOf": None}), ".properties.x.anyOf should be a list of schemas"),
    (one({"anyOf": {}}), ".properties.x.anyOf should be a list of schemas"),
    (one({"anyOf": [5]}), ".properties.x.anyOf[0] should be a schema"),
    (one({"type": "array", "items": 5}), ".properties.x.items should be a schema"),
    (one({"type": "string", "maxLength": "4"}), ".properties.x.maxLength should be a whole number"),
    (one({"type": "string", "minLength": -1}), ".properties.x.minLength should be a whole number"),
    (one({"type": "string", "pattern": None}), ".properties.x.pattern should be a string"),
    (one({"$ref": 5}), ".properties.x.$ref should be a string"),
    (
        one({"$ref": "#/$defs/a"}, **{"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}),
        "refers to itself",
    ),
    (one({"$ref": "#/$defs/a"}, **{"$defs": None}), ".$defs should be an object"),
    ({"type": "object", "additionalProperties": None}, ".additionalProperties should be a schema"),
    ({"type": "array"}, ".type should be 'object' (got 'array')"),
    ({"type": 5}, ".type: Invalid type: 5"),
    (one({"type": "string", "pattern": "("}), "unclosed group"),
    (one({"$ref": "#/nowhere"}), "does not exist"),
]


@pytest.mark.parametrize("format", TOOL_FORMATS)
@pytest.mark.parametrize(("parameters", "message"), MALFORMED, ids=lambda value: str(value)[:60])
def test_a_malformed_schema_is_a_400_that_names_its_place(format: str, parameters: Any, message: str) -> None:
    for choice in ("required", "named"):
        with pytest.raises(ApiError) as refused:
            grammar(parameters, format, choice=choice)
        assert refused.value.status_code == 400
        assert refused.value.param == "tools[1].function.parameters"
        assert refused.value.detail.startswith("tools[1].function.parameters")
        assert message in refused.value.detail
        assert len(refused.value.detail) < 500


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (one(False), "allows no"),
        (one({"type": "string", "not": {"const": "x"}}), "properties.x.not cannot be held"),
        (one({"allOf": [{"type": "string"}, {"type": "integer"}]}), "a property allows no value"),
        (
            one({"type": "string", "minLength": 5, "maxLength": 3}),
            "minLength (5) is greater than maxLength (3)",
        ),
        (
            {
                "type": "object",
                "properties": {"a": NUMBER},
                "additionalProperties": False,
                "minProperties": 2,
            },
            "minProperties 2",
        ),
        (
            {"type": "object", "required": ["b"], "properties": {}, "additionalProperties": False},
            "'b' is none of",
        ),
        (one(STRING, maxProperties=0), "maxProperties 0 is too small"),
        (one(STRING, dependentRequired={"x": ["y"]}), "dependentRequired cannot be held"),
        (
            one(
                {
                    "anyOf": [{"anyOf": [{"maxLength": a} for a in range(20)]}, {}],
                    "allOf": [{"anyOf": [{"minLength": 0}] * 20}],
                }
            ),
            "more than 256",
        ),
    ],
)
def test_a_schema_that_cannot_be_followed_is_a_400(parameters: Any, message: str) -> None:
    with pytest.raises(ApiError) as refused:
        grammar(parameters)
    assert refused.value.param == "tools[1].function.parameters"
    assert message in refused.value.detail


def test_a_malformed_schema_of_a_free_reply_is_no_error() -> None:
    ask, manner = forced({"type": "object", "properties": None}, choice="auto")
    assert grammar_of(ask, manner, TAGS.get) == ()


def test_a_pattern_is_found_anywhere_unless_it_is_anchored() -> None:
    assert searching("^a$") == "(a)"
    assert searching("a") == r"(.|\n)*(a)(.|\n)*"
    assert searching(r"^a\$") == r"(a\$)(.|\n)*"
    assert searching(r"^a\\$") == r"(a\\)"
    assert searching("^a|[|]$") == r"(a)(.|\n)*|(.|\n)*([|])"
    assert searching("(a|b)$") == r"(.|\n)*((a|b))"


def doubled(name: str, depth: int, last: Any) -> dict[str, Any]:
    """A schema whose alternatives double with every reference."""
    defs: dict[str, Any] = {f"d{at}": {name: [{"$ref": f"#/$defs/d{at + 1}"}] * 2} for at in range(depth)}
    return one({"$ref": "#/$defs/d0"}, **{"$defs": defs | {f"d{depth}": last}})


@pytest.mark.parametrize("name", ["allOf", "anyOf", "oneOf"])
@pytest.mark.parametrize("last", [False, {"type": "string"}, {"type": "integer"}])
def test_schemas_that_would_take_for_ever_are_refused_soon(name: str, last: Any) -> None:
    start = time.process_time()
    with pytest.raises(ApiError) as refused:
        grammar(doubled(name, 40, last))
    assert refused.value.param == "tools[1].function.parameters"
    parser = forced(doubled(name, 40, last))[1].parser()
    assert parser is not None
    parser.push("<tool_call>f<arg_key>x</arg_key><arg_value>5</arg_value></tool_call>")
    parser.finish()
    assert parser.take().calls
    assert time.process_time() - start < 10


def test_long_chains_of_references() -> None:
    defs: dict[str, Any] = {f"d{at}": {"$ref": f"#/$defs/d{at + 1}"} for at in range(3000)}
    schema = one({"$ref": "#/$defs/d0"}, **{"$defs": defs | {"d3000": {"type": "string"}}})
    with pytest.raises(ApiError, match="too many references"):
        grammar(schema)
    parser = forced(schema)[1].parser()
    assert parser is not None
    parser.push("<tool_call>f<arg_key>x</arg_key><arg_value>5</arg_value></tool_call>")
    parser.finish()
    assert parser.take().calls
